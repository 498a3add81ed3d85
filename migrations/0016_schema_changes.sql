-- Why:   a live mirror follows changes of schema, or stops at them, or leaves them; constraints and sequences are carried over if wanted.
--        A table that is renamed is told by its oid from another that takes its name.
-- Locks: ACCESS EXCLUSIVE on mirror_table_runtime, briefly.
-- Undo:  delete the rows, drop the column.

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('mirror', 'ddl',              'enum',    'apply', array['apply', 'block', 'ignore'], null, null, false, null, 'What is done when a table''s schema changes on the source: change the target alike, stop there, or leave the target and do without the columns that it lacks.'),
    ('mirror', 'copy_constraints', 'boolean', 'false', null, null, null, false, null, 'Create the source''s CHECK and foreign key constraints on tables that the mirror created, after the copy.'),
    ('mirror', 'copy_sequences',   'boolean', 'true',  null, null, null, false, null, 'Keep the sequences of the target''s columns at or ahead of the source''s.');

alter table peergate.mirror_table_runtime add column source_oid oid;
comment on column peergate.mirror_table_runtime.source_oid is 'The table on the source, whatever its name becomes; NULL until it was looked at.';
