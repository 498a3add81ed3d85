//! SQLSTATE codes, and names for those that we send or act on.

use std::fmt;

/// The five bytes that say what kind of error it is.
///
/// Five bytes and not a string, so that a word cannot be a code.
///
/// Source: PostgreSQL docs, errcodes-appendix.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SqlState(pub [u8; 5]);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal;)*) => {
        impl SqlState {
            $($(#[$doc])* pub const $name: SqlState = SqlState(*$code);)*
        }
    };
}

codes! {
    /// connection_exception: the engine's own connection to a peer broke.
    CONNECTION_EXCEPTION = b"08000";
    /// connection_failure: the catalog cannot be reached.
    CONNECTION_FAILURE = b"08006";
    /// protocol_violation.
    PROTOCOL_VIOLATION = b"08P01";
    /// feature_not_supported.
    FEATURE_NOT_SUPPORTED = b"0A000";
    /// invalid_parameter_value.
    INVALID_PARAMETER_VALUE = b"22023";
    /// character_not_in_repertoire.
    CHARACTER_NOT_IN_REPERTOIRE = b"22021";
    /// invalid_text_representation: a value that its type does not have.
    INVALID_TEXT = b"22P02";
    /// unique_violation.
    UNIQUE_VIOLATION = b"23505";
    /// exclusion_violation.
    EXCLUSION_VIOLATION = b"23P01";
    /// read_only_sql_transaction.
    READ_ONLY = b"25006";
    /// active_sql_transaction.
    ACTIVE_SQL_TRANSACTION = b"25001";
    /// invalid_sql_statement_name.
    UNDEFINED_STATEMENT = b"26000";
    /// invalid_authorization_specification.
    INVALID_AUTHORIZATION = b"28000";
    /// invalid_password.
    INVALID_PASSWORD = b"28P01";
    /// dependent_objects_still_exist.
    DEPENDENT_OBJECTS = b"2BP01";
    /// invalid_cursor_name.
    UNDEFINED_CURSOR = b"34000";
    /// syntax_error.
    SYNTAX_ERROR = b"42601";
    /// insufficient_privilege.
    INSUFFICIENT_PRIVILEGE = b"42501";
    /// undefined_database.
    UNDEFINED_DATABASE = b"3D000";
    /// undefined_object.
    UNDEFINED_OBJECT = b"42704";
    /// duplicate_object.
    DUPLICATE_OBJECT = b"42710";
    /// undefined_table.
    UNDEFINED_TABLE = b"42P01";
    /// undefined_column.
    UNDEFINED_COLUMN = b"42703";
    /// datatype_mismatch.
    DATATYPE_MISMATCH = b"42804";
    /// out_of_memory.
    OUT_OF_MEMORY = b"53200";
    /// too_many_connections.
    TOO_MANY_CONNECTIONS = b"53300";
    /// configuration_limit_exceeded: a slot keeps more WAL than its budget.
    CONFIGURATION_LIMIT_EXCEEDED = b"53400";
    /// program_limit_exceeded.
    PROGRAM_LIMIT_EXCEEDED = b"54000";
    /// object_not_in_prerequisite_state.
    WRONG_STATE = b"55000";
    /// object_in_use.
    OBJECT_IN_USE = b"55006";
    /// lock_not_available.
    LOCK_NOT_AVAILABLE = b"55P03";
    /// query_canceled.
    QUERY_CANCELED = b"57014";
    /// config_file_error.
    CONFIG_FILE_ERROR = b"F0000";
    /// admin_shutdown.
    ADMIN_SHUTDOWN = b"57P01";
    /// cannot_connect_now.
    CANNOT_CONNECT_NOW = b"57P03";
    /// system_error.
    SYSTEM_ERROR = b"58000";
    /// fdw_invalid_option_name: an option that does not exist.
    INVALID_OPTION_NAME = b"HV00D";
    /// fdw_unable_to_establish_connection: a peer that cannot be reached. Not class 08, which drivers and pools take for
    /// their own connection.
    PEER_UNREACHABLE = b"HV00N";
    /// internal_error.
    INTERNAL_ERROR = b"XX000";
    /// Private to Peergate: an INFO message that carries a command tag from a catalog procedure to the gateway.
    COMMAND_TAG = b"PGT01";
    /// Private to Peergate: an INFO message by which the catalog lets an EXECUTE on a peer go on.
    EXECUTION_PERMIT = b"PGT02";
    /// Private to Peergate: an INFO message by which the catalog asks the gateway to make the task of a verification.
    VERIFICATION_PERMIT = b"PGT03";
}

impl SqlState {
    /// Returns the code as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("XX000")
    }

    /// Returns the code when `text` is five letters or digits.
    pub fn from_text(text: &str) -> Option<SqlState> {
        let bytes: [u8; 5] = text.as_bytes().try_into().ok()?;
        bytes.iter().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase()).then_some(SqlState(bytes))
    }

    /// Returns the first two characters: the class of the error.
    pub fn class(&self) -> &str {
        &self.as_str()[..2]
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_five_letters_and_digits_are_a_code() {
        assert_eq!(SqlState::from_text("42P01"), Some(SqlState::UNDEFINED_TABLE));
        for text in ["", "42P0", "42P011", "42p01", "4é01"] {
            assert_eq!(SqlState::from_text(text), None);
        }
        assert_eq!(SqlState::UNDEFINED_TABLE.class(), "42");
    }
}
