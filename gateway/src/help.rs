//! `HELP`: what `docs/sql.md` says, as rows. There is no other text, so that the two cannot drift apart.

use std::sync::OnceLock;

use pg::SqlState;

use crate::parser::Refusal;

/// The page that documents the language.
const PAGE: &str = include_str!("../../docs/sql.md");

/// A section of the page that is about statements.
#[derive(Debug, PartialEq, Eq)]
struct Topic {
    /// The statements, as the heading names them.
    names: Vec<&'static str>,
    /// What they do, in one sentence or two.
    summary: String,
    /// All of the section, line by line.
    lines: Vec<String>,
}

/// What is shown: the columns' names, and the rows.
pub(crate) struct Help {
    /// Names of the columns.
    pub(crate) columns: &'static [&'static str],
    /// The rows, each as long as `columns`.
    pub(crate) rows: Vec<Vec<String>>,
}

/// Finds what there is on a topic: all of one section when the words name it, a list of those that they could mean, or, without words,
/// the list of all. `at` is where the words begin.
///
/// # Errors
/// [`Refusal`] if nothing is known of it.
pub(crate) fn help(words: &[String], at: usize) -> Result<Help, Refusal> {
    let wanted = words.join(" ").to_uppercase();
    let named = |topic: &&Topic| topic.names.contains(&wanted.as_str());
    if let Some(topic) = topics().iter().find(named) {
        let rows = topic.lines.iter().map(|line| vec![line.clone()]).collect();
        return Ok(Help { columns: &["help"], rows });
    }
    let has_words = |name: &&str| {
        let mut parts = name.split(' ');
        wanted.split(' ').all(|word| wanted.is_empty() || wanted == "ALL" || parts.any(|part| part == word))
    };
    let found = topics().iter().flat_map(|topic| topic.names.iter().map(move |name| (*name, topic)));
    let found: Vec<_> = found.filter(|(name, _)| has_words(name)).collect();
    match found[..] {
        [] => Err(Refusal {
            sqlstate: SqlState::UNDEFINED_OBJECT,
            message: format!("there is no help on \"{}\"", words.join(" ")),
            detail: None,
            hint: Some(
                "HELP without a topic lists all of them; for PostgreSQL's own statements, psql has \\h.".to_owned(),
            ),
            at,
        }),
        [(name, _)] if !wanted.is_empty() => help(&name.split(' ').map(str::to_owned).collect::<Vec<_>>(), at),
        _ => {
            let rows = found.iter().map(|(name, topic)| vec![(*name).to_owned(), topic.summary.clone()]).collect();
            Ok(Help { columns: &["statement", "description"], rows })
        }
    }
}

fn topics() -> &'static [Topic] {
    static TOPICS: OnceLock<Vec<Topic>> = OnceLock::new();
    TOPICS.get_or_init(|| {
        let sections = PAGE.split("\n## ").skip(1);
        sections.filter_map(topic).collect()
    })
}

/// Reads a section; `None` if it is not about statements, which is those whose headings are all in capitals.
fn topic(section: &'static str) -> Option<Topic> {
    let (heading, text) = section.split_once('\n')?;
    if heading.chars().any(char::is_lowercase) {
        return None;
    }
    let summary = text.split("\n\n").map(str::trim).find(|paragraph| !paragraph.is_empty())?;
    let lines = text.trim().lines().filter(|line| !line.starts_with("```") && !line.starts_with("| ---"));
    Some(Topic {
        names: heading.split(", ").collect(),
        summary: plain(summary).replace('\n', " "),
        lines: lines.map(plain).collect(),
    })
}

/// Takes out what only a page needs, and what not every client's encoding has.
fn plain(text: &str) -> String {
    let text = text.replace("**", "").replace('`', "").replace('…', "...");
    // [text](target): the target is of no use in a terminal.
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("](") {
        let (target, behind) = after.split_once(')').unwrap_or((after, ""));
        out.push_str(&before.replacen('[', "", 1));
        if target.ends_with(".md") {
            out.push_str(&format!(" (docs/{target})"));
        }
        rest = behind;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(words: &str) -> Result<Help, Refusal> {
        help(&words.split_whitespace().map(str::to_owned).collect::<Vec<_>>(), 5)
    }

    #[test]
    fn every_statement_is_listed_and_has_a_synopsis_and_examples() {
        let all = ask("").unwrap();
        assert_eq!(all.columns, ["statement", "description"]);
        for name in [
            "CREATE PEER",
            "ALTER PEER",
            "VALIDATE PEER",
            "EXPLAIN",
            "GRANT",
            "WAIT FOR MIRROR",
            "SHOW TASKS",
            "TEST ALERT",
            "HELP",
        ] {
            assert!(all.rows.iter().any(|row| row[0] == name), "{name}");
        }
        for topic in topics() {
            let text = topic.lines.join("\n");
            assert!(topic.names.iter().all(|name| text.contains(name)), "{:?} has no synopsis", topic.names);
            assert!(text.contains("Examples"), "{:?} has no examples", topic.names);
            assert!(topic.summary.ends_with('.') && topic.summary.len() < 160, "{}", topic.summary);
            assert!(text.is_ascii(), "{:?}: {:?}", topic.names, text.chars().find(|c| !c.is_ascii()));
        }
    }

    #[test]
    fn a_topic_is_shown_whole_and_several_as_a_list() {
        let one = ask("create peer").unwrap();
        assert_eq!(one.columns, ["help"]);
        assert!(one.rows.iter().any(|row| row[0].starts_with("CREATE [ OR REPLACE ] PEER name")));
        assert!(!one.rows.iter().any(|row| row[0].contains("](")));
        let several = ask("mirror").unwrap();
        assert!(several.rows.len() > 4 && several.rows.iter().all(|row| row[0].contains("MIRROR")));
        assert_eq!(ask("validate").unwrap().columns, ["help"]);
        assert_eq!(ask("all").unwrap().rows.len(), ask("").unwrap().rows.len());
        assert_eq!(ask("create table").err().unwrap().sqlstate, SqlState::UNDEFINED_OBJECT);
    }
}
