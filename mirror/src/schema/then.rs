//! What a source table looked like at a place in the stream.
//!
//! A RELATION message says what columns the rows that follow have, by name and type. It does not say which of them were there before:
//! a column that was renamed looks like one that went and one that came. The source's catalogs know, by the columns' numbers, but they
//! tell of now, and the message is of then. Here the two are brought together with what was known before the message. Pure.
//!
//! What the message does not tell is taken such that no row that follows can be refused: a constraint counts if it was there before *and*
//! is there now. Those that came since are taken up when the target has everything up to a later look, see [`crate::assemble`].

use std::collections::{BTreeSet, HashMap};

use pg::pgoutput::{Column, Identity, Relation};

use super::{RowIdentity, SourceColumn, SourceConstraint, SourceIndex, SourceTable};

/// What a table looked like.
#[derive(Debug, PartialEq, Eq)]
pub struct Then {
    /// The table.
    pub table: SourceTable,
    /// All its rows may have been written anew since it was last known: their values may be others than those that were sent.
    pub rewritten: bool,
}

/// Which columns the message's are cannot be told: the table has changed more than once since it was last known.
#[derive(Debug, PartialEq, Eq)]
pub struct Unclear;

/// A number that a column may have had then.
struct Candidate<'a> {
    known: Option<&'a SourceColumn>,
    now: Option<&'a SourceColumn>,
}

impl Candidate<'_> {
    /// It came after the table was last known and has gone since: nothing but the message knows of it.
    fn is_ghost(&self) -> bool {
        self.known.is_none() && self.now.is_none()
    }

    /// It was there before and is there now, so it was there then.
    fn was_there(&self) -> bool {
        self.known.is_some() && self.now.is_some()
    }

    fn fits(&self, column: &Column, names: &BTreeSet<&str>) -> bool {
        if self.is_ghost() {
            return !names.contains(column.name.as_str());
        }
        let mut known_or_now = [self.known, self.now].into_iter().flatten();
        let same_type = |c: &SourceColumn| c.type_oid == column.type_oid && c.type_modifier == column.type_modifier;
        known_or_now.clone().any(same_type)
            && (known_or_now.any(|c| c.name == column.name) || !names.contains(column.name.as_str()))
    }
}

/// Works out what the table looked like when `relation` was sent: `known` is what it was before, `now` what the source's catalogs say
/// (`None` if the table is gone).
///
/// # Errors
/// [`Unclear`] if more than one history leads from `known` over `relation` to `now`, or none does.
pub fn at_relation(known: &SourceTable, now: Option<&SourceTable>, relation: &Relation) -> Result<Then, Unclear> {
    let now = now.unwrap_or(known);
    let assigned = assign(known, now, &relation.columns)?;
    let mut columns: Vec<SourceColumn> = Vec::new();
    for (column, number) in relation.columns.iter().zip(&assigned) {
        // A column that has gone since, and that nothing else tells of, is left out.
        let Some(number) = number else { continue };
        columns.push(column_then(known.column(*number), now.column(*number), column)?);
    }
    // Generated columns are not sent. Those that are still there are as they were.
    for generated in known.columns.iter().filter(|c| c.generated.is_some()) {
        if now.column(generated.number).is_some() && !columns.iter().any(|c| c.number == generated.number) {
            columns.push(generated.clone());
        }
    }
    columns.sort_by_key(|c| c.number);
    let identity = identity_then(known, now, relation, &columns);
    let renamed = known.columns.iter().any(|k| now.column(k.number).is_some_and(|n| n.name != k.name));
    let mut table = SourceTable {
        oid: known.oid,
        name: pg::TableName::new(&relation.schema, &relation.name),
        indexes: indexes_then(known, now, &identity, renamed),
        constraints: constraints_then(known, now, renamed),
        columns,
        identity,
        partitioned: known.partitioned,
        root: known.root,
        files: known.files.clone(),
        storage: known.storage.clone(),
        last_number: known.last_number,
    };
    // The files of now are those of then only if nothing has changed since. If no change of columns accounts for others, it is for a look
    // to say that comes later whether rows came or went.
    if table.same_rows(now) {
        if !known.partitioned && !table.same_rows(known) {
            table.files = now.files.clone();
        }
        table.last_number = now.last_number;
    }
    Ok(Then { table, rewritten: !now.same_files(known) })
}

fn column_then(
    known: Option<&SourceColumn>,
    now: Option<&SourceColumn>,
    sent: &Column,
) -> Result<SourceColumn, Unclear> {
    let same_type = |c: &&SourceColumn| c.type_oid == sent.type_oid && c.type_modifier == sent.type_modifier;
    let typed = now.filter(same_type).or(known.filter(same_type)).ok_or(Unclear)?;
    let last = now.or(known).ok_or(Unclear)?;
    let same_identity = known.zip(now).is_some_and(|(k, n)| k.identity == n.identity);
    Ok(SourceColumn {
        number: last.number,
        name: sent.name.clone(),
        type_oid: typed.type_oid,
        type_modifier: typed.type_modifier,
        type_sql: typed.type_sql.clone(),
        collation: typed.collation.clone(),
        not_null: known.is_some_and(|c| c.not_null) && now.is_some_and(|c| c.not_null),
        default: if last.generated.is_none() { last.default.clone() } else { None },
        generated: None,
        identity: if same_identity { last.identity } else { None },
        missing: last.missing.clone(),
    })
}

/// Finds the number of each of the message's columns, `None` for one that has gone since without having been known.
///
/// Numbers rise in the order of the columns. One that was known and is there now was there then; one that came later than another that
/// is there now was not there without it. If that leaves more than one way, it is unclear.
fn assign(known: &SourceTable, now: &SourceTable, columns: &[Column]) -> Result<Vec<Option<i16>>, Unclear> {
    fn ordinary(table: &SourceTable) -> impl Iterator<Item = &SourceColumn> {
        table.columns.iter().filter(|c| c.generated.is_none())
    }
    let same = |c: &SourceColumn, sent: &Column| {
        (c.name.as_str(), c.type_oid, c.type_modifier) == (sent.name.as_str(), sent.type_oid, sent.type_modifier)
    };
    if known.same_rows(now)
        && known.last_number == now.last_number
        && ordinary(known).count() == columns.len()
        && ordinary(known).zip(columns).all(|(c, sent)| same(c, sent))
    {
        return Ok(ordinary(known).map(|c| Some(c.number)).collect());
    }
    let names = ordinary(known).chain(ordinary(now)).map(|c| c.name.as_str()).collect();
    let find = |table: &SourceTable, number| ordinary(table).position(|c| c.number == number);
    let (known_columns, now_columns): (Vec<_>, Vec<_>) = (ordinary(known).collect(), ordinary(now).collect());
    let candidates: Vec<(i16, Candidate<'_>)> = (1..=now.last_number.max(known.last_number))
        .map(|number| {
            let known_column = find(known, number).map(|at| known_columns[at]);
            let now_column = find(now, number).map(|at| now_columns[at]);
            (number, Candidate { known: known_column, now: now_column })
        })
        // What was gone already when the table was last known does not come back; generated columns are not sent.
        .filter(|(number, c)| !c.is_ghost() || (*number > known.last_number && now.column(*number).is_none()))
        .collect();
    let mut search = Search { columns, candidates: &candidates, names: &names, ways: HashMap::new() };
    if search.ways(Place::default()) != 1 {
        return Err(Unclear);
    }
    let mut place = Place::default();
    let mut found = Vec::with_capacity(columns.len());
    while let Some((number, candidate)) = candidates.get(place.candidate) {
        match search.taken(place) {
            Some(next) if search.ways(next) == 1 => {
                found.push((!candidate.is_ghost()).then_some(*number));
                place = next;
            }
            _ => place = search.left(place).ok_or(Unclear)?,
        }
    }
    Ok(found)
}

/// Where the search is.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Place {
    column: usize,
    candidate: usize,
    /// A column that is there now was not there yet: none that is newer was.
    ended: bool,
    /// A number that nothing is known of was left out. Which of several next to each other were there does not matter: the first.
    skipped_ghost: bool,
}

/// Counts the ways to give columns their numbers, no further than two.
struct Search<'a> {
    columns: &'a [Column],
    candidates: &'a [(i16, Candidate<'a>)],
    names: &'a BTreeSet<&'a str>,
    ways: HashMap<Place, u8>,
}

impl Search<'_> {
    fn ways(&mut self, place: Place) -> u8 {
        if place.candidate == self.candidates.len() {
            return u8::from(place.column == self.columns.len());
        }
        if let Some(ways) = self.ways.get(&place) {
            return *ways;
        }
        let taken = self.taken(place).map_or(0, |next| self.ways(next));
        let left = self.left(place).map_or(0, |next| self.ways(next));
        let ways = (taken + left).min(2);
        self.ways.insert(place, ways);
        ways
    }

    /// The next column has this number.
    fn taken(&self, place: Place) -> Option<Place> {
        let (_, candidate) = &self.candidates[place.candidate];
        let column = self.columns.get(place.column)?;
        let came_too_late = place.ended && candidate.known.is_none();
        let not_the_first = place.skipped_ghost && candidate.is_ghost();
        (!came_too_late && !not_the_first && candidate.fits(column, self.names)).then_some(Place {
            column: place.column + 1,
            candidate: place.candidate + 1,
            skipped_ghost: place.skipped_ghost && candidate.is_ghost(),
            ..place
        })
    }

    /// No column has this number.
    fn left(&self, place: Place) -> Option<Place> {
        let (_, candidate) = &self.candidates[place.candidate];
        (!candidate.was_there()).then_some(Place {
            candidate: place.candidate + 1,
            ended: place.ended || (candidate.known.is_none() && candidate.now.is_some()),
            skipped_ghost: candidate.is_ghost(),
            ..place
        })
    }
}

fn identity_then(known: &SourceTable, now: &SourceTable, relation: &Relation, columns: &[SourceColumn]) -> RowIdentity {
    // The columns of a key, by the names that they had then.
    let named_then = |table: &SourceTable| -> Option<Vec<String>> {
        let RowIdentity::Key(names) = &table.identity else { return None };
        let number = |name: &String| table.columns.iter().find(|c| c.name == *name).map(|c| c.number);
        let name = |number: i16| columns.iter().find(|c| c.number == number).map(|c| c.name.clone());
        names.iter().map(|n| name(number(n)?)).collect()
    };
    match relation.identity {
        Identity::Nothing => RowIdentity::InsertsOnly,
        Identity::Default | Identity::Index => {
            let sent: Vec<String> = relation.columns.iter().filter(|c| c.key).map(|c| c.name.clone()).collect();
            if sent.is_empty() {
                return RowIdentity::InsertsOnly;
            }
            let same = |key: &Vec<String>| super::same_set(key, &sent);
            let in_order = named_then(known).filter(same).or(named_then(now).filter(same));
            RowIdentity::Key(in_order.unwrap_or(sent))
        }
        // Whole old rows say nothing of keys: what was good before is, as long as it is there.
        Identity::Full => match named_then(known).or_else(|| named_then(now)) {
            Some(key) => RowIdentity::Key(key),
            None => RowIdentity::WholeRow,
        },
    }
}

/// The indexes that were there before and are there now, under whatever name, and the one of a new key.
fn indexes_then(known: &SourceTable, now: &SourceTable, identity: &RowIdentity, renamed: bool) -> Vec<SourceIndex> {
    let mut indexes: Vec<SourceIndex> = Vec::new();
    for index in &known.indexes {
        if let Some(same) = successor(index, &known.indexes, &now.indexes, renamed) {
            indexes.push(SourceIndex { name: same.name.clone(), ..index.clone() });
        } else if index.identity && *identity == known.identity {
            // The rows that follow are told apart by it still.
            indexes.push(index.clone());
        }
    }
    let key_of_now = now.indexes.iter().find(|i| i.identity);
    if let (RowIdentity::Key(key), RowIdentity::Key(key_now), Some(index)) = (identity, &now.identity, key_of_now)
        && super::same_set(key, key_now)
        && !indexes.iter().any(|i| i.name == index.name)
    {
        indexes.push(index.clone());
    }
    indexes
}

/// Finds what an index of `olds` has become among `news`: the one of its name, or else one that is the same under a name that is new.
pub(super) fn successor<'a>(
    old: &SourceIndex,
    olds: &[SourceIndex],
    news: &'a [SourceIndex],
    columns_renamed: bool,
) -> Option<&'a SourceIndex> {
    let same = |new: &&SourceIndex| is_same_index(old, new, columns_renamed);
    let is_new = |new: &&SourceIndex| !olds.iter().any(|o| o.name == new.name);
    let of_its_name = news.iter().filter(same).find(|new| new.name == old.name);
    of_its_name.or_else(|| news.iter().filter(is_new).find(same))
}

/// Returns whether an index is the one it was: it may have another name, or, if columns were renamed, another definition.
fn is_same_index(old: &SourceIndex, new: &SourceIndex, columns_renamed: bool) -> bool {
    let same_kind =
        old.primary == new.primary && old.unique == new.unique && old.constraint.is_some() == new.constraint.is_some();
    let same_definition = old.definition == new.definition && old.constraint == new.constraint;
    same_kind && (same_definition || (columns_renamed && old.name == new.name))
}

fn constraints_then(known: &SourceTable, now: &SourceTable, renamed: bool) -> Vec<SourceConstraint> {
    let kept = |old: &&SourceConstraint| {
        now.constraints.iter().any(|n| n.name == old.name && (renamed || n.definition == old.definition))
    };
    known.constraints.iter().filter(kept).cloned().collect()
}

#[cfg(test)]
mod tests;
