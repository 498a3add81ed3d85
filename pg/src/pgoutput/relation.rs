//! What a row of a relation looks like.

/// How the source identifies a row that is updated or deleted.
///
/// Source: PostgreSQL docs, sql-altertable, "REPLICA IDENTITY".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// By the primary key, if there is one.
    Default,
    /// Not at all.
    Nothing,
    /// By all columns.
    Full,
    /// By a unique index.
    Index,
}

/// A `Relation` message: sent before the first row of a table, and again when the table has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// The relation's oid on the source.
    pub oid: u32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Its replica identity.
    pub identity: Identity,
    /// Its columns, in the order of a tuple's values.
    pub columns: Vec<Column>,
}

/// One column of a [`Relation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// It is part of the replica identity.
    pub key: bool,
    /// Its name.
    pub name: String,
    /// Its type on the source.
    pub type_oid: u32,
    /// The type's modifier; -1 when there is none.
    pub type_modifier: i32,
}
