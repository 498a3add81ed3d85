-- Why:   what a mirror holds in memory has a bound of its own: rows take more than their bytes, the more so the smaller they are.
-- Locks: none.                                        Undo: delete the row.

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('mirror', 'memory_max', 'bytes', '256MB', null, 1048576, 1099511627776, false, null, 'Memory for changes that were read and not written yet, estimated; a single row may take more.');
