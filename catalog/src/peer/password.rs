//! Passwords that live outside the catalog: in the environment, in a file, or in a password file.

use std::fs;

use super::PeerOptions;

/// Variables that hold secrets of Peergate itself, and never a peer's.
const OWN_VARIABLES: &[&str] = &["PEERGATE_KEY", "PEERGATE_PASSWORD", "PEERGATE_CATALOG"];

/// Options that name such a password.
const REFERENCES: &[&str] = &["password_env", "password_file", "passfile"];

impl PeerOptions {
    /// Returns the options given that name a password outside the catalog.
    pub fn references(&self) -> impl Iterator<Item = &'static str> {
        REFERENCES.iter().copied().filter(|name| self.get(name).is_some())
    }

    /// Returns the password for one of the hosts: the one given, else what `password_env`, `password_file` or `passfile` name.
    /// They are read at each call, so that a password that was changed there is taken up.
    ///
    /// # Errors
    /// What is wrong, naming the option; never with the contents of a file.
    pub(crate) fn password(&self, host: &str, port: u16, database: &str, user: &str) -> Result<Option<String>, String> {
        if let Some(password) = self.get("password") {
            return Ok(Some(password.to_owned()));
        }
        if let Some(name) = self.get("password_env") {
            let value = std::env::var(name).ok().filter(|_| !OWN_VARIABLES.contains(&name));
            return match value {
                Some(value) => Ok(Some(value)),
                None => Err(format!("option \"password_env\": environment variable {name} is not set")),
            };
        }
        let read = |option: &str, path: &str| {
            fs::read_to_string(path).map_err(|error| format!("option \"{option}\": cannot read {path}: {error}"))
        };
        if let Some(path) = self.get("password_file") {
            let text = read("password_file", path)?;
            let line = text.lines().next().filter(|line| !line.is_empty());
            return match line {
                Some(line) => Ok(Some(line.to_owned())),
                None => Err(format!("option \"password_file\": {path} is empty")),
            };
        }
        match self.get("passfile") {
            Some(path) => Ok(look_up(&read("passfile", path)?, [host, &port.to_string(), database, user])),
            None => Ok(None),
        }
    }
}

/// Finds the password in the text of a password file: the first line whose four fields fit. A host that is the directory of a Unix
/// socket fits `localhost`, too.
///
/// Source: PostgreSQL docs, libpq-pgpass.
fn look_up(text: &str, wanted: [&str; 4]) -> Option<String> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = fields_of(line);
        let (password, fields) = fields.get(4).zip(fields.get(..4))?;
        let fits = fields.iter().zip(wanted).enumerate().all(|(n, ((field, literal), wanted))| {
            (field == "*" && !literal) || field == wanted || n == 0 && field == "localhost" && wanted.starts_with('/')
        });
        fits.then(|| password.0.clone())
    })
}

/// The fields of a line, and whether something in them was escaped. A backslash escapes a colon or itself.
fn fields_of(line: &str) -> Vec<(String, bool)> {
    let mut fields = vec![(String::new(), false)];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        let last = fields.len() - 1;
        match character {
            '\\' => {
                fields[last].1 = true;
                fields[last].0.extend(characters.next());
            }
            ':' => fields.push((String::new(), false)),
            other => fields[last].0.push(other),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_fits_has_the_password() {
        let text =
            "# comment\ndb1:5432:shop:repl:one\n*:*:*:repl:t\\:wo\nlocalhost:*:*:*:three\n\\*:*:*:*:four\nbroken";
        assert_eq!(look_up(text, ["db1", "5432", "shop", "repl"]).as_deref(), Some("one"));
        assert_eq!(look_up(text, ["db1", "5433", "shop", "repl"]).as_deref(), Some("t:wo"));
        assert_eq!(look_up(text, ["/run/postgresql", "5432", "shop", "etl"]).as_deref(), Some("three"));
        assert_eq!(look_up(text, ["db1", "5432", "shop", "etl"]), None);
    }

    #[test]
    fn what_is_missing_is_named_and_what_is_ours_is_not_read() {
        let password = |option: &'static str, value: &str| {
            PeerOptions::plain([(option, value.to_owned())]).password("h", 1, "d", "u")
        };
        assert!(password("password_env", "NO_SUCH_VARIABLE").unwrap_err().contains("NO_SUCH_VARIABLE is not set"));
        assert!(password("password_env", "PEERGATE_KEY").is_err());
        assert!(password("password_file", "/nowhere/secret").unwrap_err().contains("/nowhere/secret"));
        assert_eq!(password("user", "u"), Ok(None));
        // The tests' own environment has this one.
        assert_eq!(password("password_env", "CARGO_PKG_NAME"), Ok(Some("catalog".to_owned())));
    }
}
