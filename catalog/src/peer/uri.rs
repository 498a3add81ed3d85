//! Connection strings in libpq's URI form.

use percent_encoding::percent_decode_str;

use super::OptionError;

/// Takes `postgres://user:password@host:port,host:port/database?option=value` apart.
///
/// Source: PostgreSQL docs, libpq-connect, "Connection URIs".
pub(super) fn parse_uri(uri: &str) -> Result<Vec<(String, String)>, OptionError> {
    // The uri itself is never quoted in a message: it may hold a password.
    let bad = |message: &str| OptionError::invalid("uri", format!("invalid connection URI: {message}"));
    let decode = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8();
        decoded.map(|t| t.into_owned()).map_err(|_| bad("percent-encoded text is not UTF-8"))
    };
    let rest = ["postgres://", "postgresql://"].iter().find_map(|scheme| uri.strip_prefix(scheme));
    let rest = rest.ok_or_else(|| bad("it must begin with postgres://"))?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let mut options = Vec::new();
    let mut add = |name: &str, value: String| {
        if !value.is_empty() {
            options.push((name.to_owned(), value));
        }
    };
    let hosts = match authority.rsplit_once('@') {
        Some((credentials, hosts)) => {
            let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
            add("user", decode(user)?);
            add("password", decode(password)?);
            hosts
        }
        None => authority,
    };
    let mut names = Vec::new();
    let mut ports = Vec::new();
    for host in hosts.split(',').filter(|h| !h.is_empty()) {
        let (name, port) = match host.strip_prefix('[') {
            Some(v6) => {
                let (name, after) = v6.split_once(']').ok_or_else(|| bad("missing \"]\" after an IPv6 address"))?;
                (name, after.strip_prefix(':').unwrap_or(""))
            }
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(decode(name)?);
        ports.push(if port.is_empty() { "5432".to_owned() } else { port.to_owned() });
    }
    add("host", names.join(","));
    if hosts.contains(':') {
        add("port", ports.join(","));
    }
    add("database", decode(database)?);
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(|| bad("missing \"=\" after a parameter's name"))?;
        let name = decode(name)?;
        add(if name == "dbname" { "database" } else { &name }, decode(value)?);
    }
    Ok(options)
}
