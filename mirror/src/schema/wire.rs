//! Whether a type's binary form means the same on two servers. Pure.

use std::collections::HashMap;

use super::FIRST_USER_OID;

/// The oldest server that takes arrays and composites whose members have other oids than its own.
pub const IGNORES_MEMBER_OIDS: u32 = 140_000;

/// What a server's catalog says of a type, as far as its binary form depends on it.
#[derive(Clone, Debug, Default)]
pub struct TypeNode {
    /// `pg_type.typtype`: `b`, `c`, `d`, `e`, `m` or `r`.
    pub kind: char,
    /// It has a function that sends it, and one that receives it.
    pub binary: bool,
    /// Its binary form is of no use elsewhere: it is an oid of the server's catalog, such as `regclass`, or not always one that can be
    /// read again, such as that of an empty `int2vector` or, since the minor versions of 2026, `tsquery`.
    pub local: bool,
    /// The members of an array, the base of a domain, the subtype of a range, the range of a multirange, the columns of a composite.
    pub parts: Vec<u32>,
    /// It is an array.
    pub array: bool,
    /// The extension that it belongs to, with its version, and its name.
    pub extension: Option<String>,
}

/// Works out what a type's binary form is made of; `None` if it cannot be trusted to mean the same elsewhere.
///
/// Two servers read and write a type alike when this is equal on both: built-in types have the same oid everywhere, enums send their
/// label, and all else is made of other types. Extensions may change their form, and so must have the same version.
pub fn wire_form(oid: u32, nodes: &HashMap<u32, TypeNode>, server_version: u32) -> Option<String> {
    let node = nodes.get(&oid)?;
    let parts = || -> Option<String> {
        let parts: Option<Vec<String>> =
            node.parts.iter().map(|part| wire_form(*part, nodes, server_version)).collect();
        Some(parts?.join(","))
    };
    let embeds = |form: String| {
        // Arrays and composites name the types of their members by oid.
        let foreign = node.parts.iter().any(|part| *part >= FIRST_USER_OID);
        (!foreign || server_version >= IGNORES_MEMBER_OIDS).then_some(form)
    };
    if node.kind == 'd' {
        return parts();
    }
    if !node.binary || node.local {
        return None;
    }
    if node.array {
        return embeds(format!("array({})", parts()?));
    }
    match node.kind {
        'e' => Some("enum".to_owned()),
        'c' => embeds(format!("row({})", parts()?)),
        'r' if oid >= FIRST_USER_OID => Some(format!("range({})", parts()?)),
        'm' if oid >= FIRST_USER_OID => Some(format!("multirange({})", parts()?)),
        'b' | 'r' | 'm' if oid < FIRST_USER_OID => Some(oid.to_string()),
        'b' => node.extension.clone(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(kind: char, parts: &[u32]) -> TypeNode {
        TypeNode { kind, binary: true, parts: parts.to_vec(), ..TypeNode::default() }
    }

    fn nodes() -> HashMap<u32, TypeNode> {
        let array = |part| TypeNode { array: true, ..node('b', &[part]) };
        HashMap::from([
            (23, node('b', &[])),
            (1007, array(23)),
            (2205, TypeNode { local: true, ..node('b', &[]) }),
            (2210, array(2205)),
            (20_000, node('e', &[])),
            (20_001, array(20_000)),
            (20_002, node('d', &[1007])),
            (20_003, node('c', &[23, 20_000])),
            (20_004, node('r', &[20_002])),
            (20_005, node('b', &[])),
            (20_006, TypeNode { extension: Some("citext 1.6 citext".into()), ..node('b', &[]) }),
            (20_007, node('c', &[23, 2205])),
            (20_008, TypeNode { binary: false, ..node('b', &[]) }),
        ])
    }

    #[test]
    fn a_form_is_what_a_type_is_made_of() {
        let form = |oid| wire_form(oid, &nodes(), 150_000);
        assert_eq!(form(1007).as_deref(), Some("array(23)"));
        assert_eq!(form(20_001).as_deref(), Some("array(enum)"));
        assert_eq!(form(20_002), form(1007), "a domain is sent as its base");
        assert_eq!(form(20_003).as_deref(), Some("row(23,enum)"));
        assert_eq!(form(20_004).as_deref(), Some("range(array(23))"));
        assert_eq!(form(20_006).as_deref(), Some("citext 1.6 citext"));
    }

    #[test]
    fn what_may_mean_something_else_elsewhere_has_none() {
        for oid in [2205, 2210, 20_005, 20_007, 20_008, 99_999] {
            assert_eq!(wire_form(oid, &nodes(), 150_000), None, "{oid}");
        }
        assert_eq!(wire_form(20_001, &nodes(), 130_000), None, "13 insists on its own oids");
        assert_eq!(wire_form(1007, &nodes(), 130_000).as_deref(), Some("array(23)"));
    }
}
