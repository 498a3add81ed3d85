use pg::pgoutput::{Identity, Tuple};

use super::*;

const NAMES: [&str; 2] = ["streams", "late"];

/// Two tables: one streams from 50 on, the other does not. What is taken fails, as nothing is known of the tables.
fn assembler() -> Assembler {
    let routes = [Route::From(Lsn(50)), Route::Ignore];
    let routes = NAMES.map(|n| TableName::new("public", n)).into_iter().zip(routes).collect();
    let tables = Tables {
        known: HashMap::new(),
        targets: Targets::new(),
        types: Types::new(),
        binary: false,
        builtin: HashSet::new(),
        in_order: false,
        ddl: Ddl::Apply,
        routes,
        others_come: true,
    };
    let mut assembler = Assembler::new(tables, Lsn(10));
    for (oid, name) in (1..).zip(NAMES.into_iter().chain(["theirs"])) {
        let (schema, name) = ("public".to_owned(), name.to_owned());
        let relation = Relation { oid, schema, name, identity: Identity::Default, columns: Vec::new() };
        assembler.handle(Message::Relation(relation)).unwrap();
    }
    assembler
}

fn insert(relation: u32) -> Message {
    Message::Insert { relation, new: Tuple::split_from(&mut Bytes::from_static(b"\0\x01n")).unwrap() }
}

/// A transaction of one row in each of these relations, whose commit record is ten long.
fn transaction(assembler: &mut Assembler, commit: u64, relations: &[u32]) -> Result<(), Error> {
    let commit_lsn = Lsn(commit);
    assembler.handle(Message::Begin { commit_lsn, commit_time: 0, xid: 1 })?;
    for relation in relations {
        assembler.handle(insert(*relation))?;
    }
    assembler.handle(Message::Commit { commit_lsn, end_lsn: Lsn(commit + 10), commit_time: 0 })
}

#[test]
fn what_is_in_a_copy_or_comes_another_way_is_left_out() {
    let mut assembler = assembler();
    transaction(&mut assembler, 20, &[1, 2, 3]).unwrap();
    assert_eq!(assembler.idle_position(), Some(Lsn(30)), "nothing of it waits");
    assert!(transaction(&mut assembler, 50, &[2, 3]).is_ok());
    assert!(transaction(&mut assembler, 60, &[1]).is_err(), "from its position on it is taken");
}

#[test]
fn a_table_can_be_left_out_from_any_transaction_on() {
    let mut assembler = assembler();
    assembler.ignore(&[TableName::new("public", "streams")]);
    assert!(transaction(&mut assembler, 60, &[1, 2]).is_ok());
    assert_eq!(assembler.boundary(), Some(Lsn(70)));
}

#[test]
fn a_lane_takes_what_commits_before_its_end_and_nothing_after_it() {
    let mut assembler = assembler();
    transaction(&mut assembler, 20, &[2]).unwrap();
    assert_eq!(assembler.stop_at(Lsn(60)), Lsn(60));
    assembler.keepalive(Lsn(45));
    assert_eq!(assembler.idle_position(), Some(Lsn(45)));
    // One that would fail if it were taken.
    transaction(&mut assembler, 60, &[1]).unwrap();
    assert_eq!(assembler.idle_position(), Some(Lsn(60)));
    assembler.keepalive(Lsn(90));
    assert_eq!(assembler.idle_position(), Some(Lsn(60)), "it stays there");
}

#[test]
fn a_lane_that_has_gone_further_stops_where_it_is() {
    let mut assembler = assembler();
    transaction(&mut assembler, 20, &[2]).unwrap();
    assert_eq!(assembler.stop_at(Lsn(25)), Lsn(30));
    let mut amid = self::assembler();
    amid.handle(Message::Begin { commit_lsn: Lsn(40), commit_time: 0, xid: 1 }).unwrap();
    assert_eq!(amid.boundary(), None);
    assert_eq!(amid.stop_at(Lsn(25)), Lsn(41), "the transaction that is under way is taken whole");
}

#[test]
fn a_transaction_that_is_skipped_is_told_and_passed() {
    let mut assembler = assembler().leaving_out(&[Lsn(60)]);
    transaction(&mut assembler, 60, &[1, 1, 2]).unwrap();
    let told = assembler.take_left_out();
    let changes = NAMES.map(|n| TableName::new("public", n)).into_iter().zip([[2, 0, 0, 0], [1, 0, 0, 0]]).collect();
    assert_eq!(told, [LeftOut { commit_lsn: Lsn(60), changes }]);
    assert_eq!((assembler.idle_position(), assembler.take_left_out()), (Some(Lsn(70)), Vec::new()));
    assert!(transaction(&mut assembler, 80, &[1]).is_err(), "only that one");
}
