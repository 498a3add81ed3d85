// pgjdbc: named statements after a few uses, portals with a fetch size, its simple mode, autosave, COPY, large objects.

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.nio.charset.StandardCharsets;
import java.sql.BatchUpdateException;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;
import java.util.Properties;

import org.postgresql.PGConnection;
import org.postgresql.largeobject.LargeObject;
import org.postgresql.largeobject.LargeObjectManager;
import org.postgresql.util.PSQLException;

public class Pgjdbc {
    static final int LARGE_ROWS = 200_000;
    static final long LARGE_SUM = LARGE_ROWS * (LARGE_ROWS + 1L) / 2;
    static final long DEADLINE_MS = 60_000;

    static Connection connect(String port, String... properties) throws SQLException {
        Properties all = new Properties();
        all.setProperty("user", System.getenv("PGUSER"));
        all.setProperty("password", System.getenv("PGPASSWORD"));
        all.setProperty("sslmode", System.getenv("PGSSLMODE"));
        all.setProperty("sslrootcert", System.getenv("PGSSLROOTCERT"));
        for (int i = 0; i < properties.length; i += 2) {
            all.setProperty(properties[i], properties[i + 1]);
        }
        String place = System.getenv("PGHOST") + ":" + port + "/" + System.getenv("PGDATABASE");
        return DriverManager.getConnection("jdbc:postgresql://" + place, all);
    }

    static Connection gate(String... properties) throws SQLException {
        return connect(System.getenv("PGPORT"), properties);
    }

    static void expect(Object found, Object expected) {
        if (!Objects.equals(found, expected)) {
            throw new AssertionError("found " + found + ", expected " + expected);
        }
    }

    static List<String> column(Connection connection, String query) throws SQLException {
        List<String> values = new ArrayList<>();
        try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery(query)) {
            while (rows.next()) {
                values.add(rows.getString(1));
            }
        }
        return values;
    }

    /** The peers beside the two that are always there. */
    static List<String> peers(Connection connection) throws SQLException {
        return column(connection, "select name from peers where name not in ('source', 'target') order by name");
    }

    static void execute(Connection connection, String text) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.execute(text);
        }
    }

    static void fails(Connection connection, String text, String state, int position) throws SQLException {
        try {
            execute(connection, text);
        } catch (PSQLException error) {
            expect(error.getSQLState(), state);
            expect(error.getServerErrorMessage().getPosition(), position);
            return;
        }
        throw new AssertionError(text + " did not fail");
    }

    static void plainSql(Connection connection, boolean simple) throws SQLException {
        try (PreparedStatement statement = connection.prepareStatement("select ?::int * 2, ?::text")) {
            for (int i = 0; i < 20; i++) {
                statement.setInt(1, i);
                statement.setString(2, "é🐘");
                try (ResultSet rows = statement.executeQuery()) {
                    rows.next();
                    expect(rows.getInt(1), i * 2);
                    expect(rows.getString(2), "é🐘");
                }
            }
        }
        // From the fifth use on, it has a name on the server; then its results come in binary.
        String named = "select count(*) > 0 from pg_prepared_statements where statement like 'select $1%'";
        expect(column(connection, named), List.of(simple ? "f" : "t"));
        try (Statement statement = connection.createStatement()) {
            expect(statement.execute("create temp table several (a int); insert into several values (1), (2); table several"),
                false);
            expect(statement.getMoreResults(), false);
            expect(statement.getUpdateCount(), 2);
            expect(statement.getMoreResults(), true);
        }
    }

    static void transactions(Connection connection) throws SQLException {
        connection.setAutoCommit(false);
        execute(connection, "create table t_rolled_back (a int)");
        execute(connection, "create peer rolled_back from postgres with (host = 'h', user = 'u', validate = false)");
        execute(connection, "create mirror rolled_back from source to rolled_back for table orders");
        expect(peers(connection), List.of("rolled_back"));
        connection.rollback();
        expect(peers(connection), List.of());
        expect(column(connection, "select to_regclass('t_rolled_back')").get(0), null);
        execute(connection, "create peer kept from postgres with (host = 'h', user = 'u', validate = false)");
        Savepoint savepoint = connection.setSavepoint();
        execute(connection, "drop peer kept");
        connection.rollback(savepoint);
        connection.commit();
        connection.setAutoCommit(true);
        expect(peers(connection), List.of("kept"));
    }

    static void parameters(Connection connection) throws SQLException {
        String text = "create peer bound from postgres with (host = ?, port = ?, user = ?, password = ?, validate = ?)";
        try (PreparedStatement create = connection.prepareStatement(text);
                Statement drop = connection.createStatement()) {
            // Often enough that it becomes a named statement.
            for (int i = 0; i < 8; i++) {
                create.setString(1, "db.example");
                create.setString(2, "6543");
                create.setString(3, "u'");
                create.setString(4, "geheim");
                create.setString(5, "false");
                expect(create.executeUpdate(), 0);
                expect(column(connection, "select options->>'user' from peers where name = 'bound'"), List.of("u'"));
                drop.execute("drop peer bound");
            }
        }
        expect(column(connection, "show peers"), List.of("kept", "source", "target"));
    }

    static void errors(Connection connection) throws SQLException {
        fails(connection, "select 'é', nope from pg_class", "42703", 13);
        String unknown = "create peer x from postgres with (hosst = 'h', user = 'u', validate = false)";
        fails(connection, unknown, "HV00D", unknown.indexOf("hosst") + 1);
        fails(connection, "create peer x frm postgres", "42601", 15);
        fails(connection, "drop peer kept, no_such_peer", "42704", 17);
        // A batch is one pipeline: with autocommit off, what went before the failure is undone by the rollback.
        connection.setAutoCommit(false);
        try (Statement batch = connection.createStatement()) {
            batch.addBatch("create table gone (a int)");
            batch.addBatch("drop peer kept");
            batch.addBatch("drop peer no_such_peer");
            batch.executeBatch();
            throw new AssertionError("the batch did not fail");
        } catch (BatchUpdateException error) {
            expect(error.getSQLState(), "42704");
        }
        connection.rollback();
        connection.setAutoCommit(true);
        expect(column(connection, "select to_regclass('gone')").get(0), null);
        expect(peers(connection), List.of("kept"));
    }

    static void cancel(Connection connection) throws Exception {
        int pid = connection.unwrap(PGConnection.class).getBackendPID();
        String running = "select count(*) from pg_stat_activity where state = 'active' and wait_event_type is not null"
            + " and wait_event <> 'ClientRead' and pid = " + pid;
        for (String text : List.of("select pg_sleep(600)", "wait for mirror unfinished")) {
            try (Statement statement = connection.createStatement()) {
                Thread canceler = new Thread(() -> {
                    try (Connection direct = connect(System.getenv("DIRECT_PORT"))) {
                        long deadline = System.currentTimeMillis() + DEADLINE_MS;
                        while (!column(direct, running).equals(List.of("1"))) {
                            if (System.currentTimeMillis() > deadline) {
                                throw new AssertionError("the statement did not begin");
                            }
                        }
                        statement.cancel();
                    } catch (SQLException error) {
                        throw new AssertionError(error);
                    }
                });
                canceler.start();
                try {
                    statement.execute(text);
                    throw new AssertionError(text + " was not canceled");
                } catch (PSQLException error) {
                    expect(error.getSQLState(), "57014");
                }
                canceler.join();
            }
            // The driver's own timeout is a cancel request too.
            try (Statement statement = connection.createStatement()) {
                statement.setQueryTimeout(1);
                statement.execute(text);
                throw new AssertionError(text + " did not time out");
            } catch (PSQLException error) {
                expect(error.getSQLState(), "57014");
            }
        }
        expect(column(connection, "select 1"), List.of("1"));
    }

    static void largeResult(Connection connection) throws SQLException {
        connection.setAutoCommit(false);
        String text = "select i, repeat(md5(i::text), 3) from generate_series(1, ?) i";
        // All at once, and a portal that is read 1000 rows at a time.
        for (int fetchSize : new int[] {0, 1000}) {
            try (PreparedStatement statement = connection.prepareStatement(text)) {
                statement.setFetchSize(fetchSize);
                statement.setInt(1, LARGE_ROWS);
                long sum = 0;
                long length = 0;
                try (ResultSet rows = statement.executeQuery()) {
                    while (rows.next()) {
                        sum += rows.getInt(1);
                        length += rows.getString(2).length();
                    }
                }
                expect(sum, LARGE_SUM);
                expect(length, LARGE_ROWS * 96L);
            }
        }
        // Our own rows, one at a time.
        try (Statement statement = connection.createStatement()) {
            statement.setFetchSize(1);
            try (ResultSet rows = statement.executeQuery("show peers")) {
                int count = 0;
                while (rows.next()) {
                    count++;
                }
                expect(count, 3);
            }
        }
        connection.commit();
        connection.setAutoCommit(true);
    }

    static void copy(Connection connection) throws Exception {
        execute(connection, "create temp table copied (i int, s text)");
        StringBuilder lines = new StringBuilder();
        for (int i = 1; i <= LARGE_ROWS; i++) {
            lines.append(i).append("\trow\\t").append(i).append('\n');
        }
        byte[] bytes = lines.toString().getBytes(StandardCharsets.UTF_8);
        var manager = connection.unwrap(PGConnection.class).getCopyAPI();
        expect(manager.copyIn("copy copied from stdin", new ByteArrayInputStream(bytes)), (long) LARGE_ROWS);
        expect(column(connection, "select sum(i) from copied"), List.of(Long.toString(LARGE_SUM)));
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        manager.copyOut("copy copied to stdout", out);
        expect(out.toString(StandardCharsets.UTF_8), lines.toString());
        try {
            manager.copyIn("copy copied from stdin", new ByteArrayInputStream("no number\tx\n".getBytes()));
            throw new AssertionError("a bad row was taken");
        } catch (PSQLException error) {
            expect(error.getSQLState(), "22P02");
        }
    }

    /** Large objects are read and written by FunctionCall messages. */
    static void largeObjects(Connection connection) throws SQLException {
        connection.setAutoCommit(false);
        LargeObjectManager manager = connection.unwrap(PGConnection.class).getLargeObjectAPI();
        long oid = manager.createLO();
        byte[] data = new byte[1 << 20];
        for (int i = 0; i < data.length; i++) {
            data[i] = (byte) (i * 31);
        }
        try (LargeObject object = manager.open(oid, LargeObjectManager.READWRITE)) {
            object.write(data);
            object.seek(0);
            expect(java.util.Arrays.equals(object.read(data.length), data), true);
        }
        manager.delete(oid);
        connection.commit();
        connection.setAutoCommit(true);
    }

    /** What tools ask of the catalogs, through the gateway and directly. */
    static void metadata(Connection connection) throws SQLException {
        execute(connection, "create table described (id bigint primary key, s varchar(10) not null, n numeric(8, 2))");
        List<String> found = new ArrayList<>();
        try (Connection direct = connect(System.getenv("DIRECT_PORT"))) {
            for (Connection one : List.of(connection, direct)) {
                StringBuilder text = new StringBuilder();
                var metadata = one.getMetaData();
                for (ResultSet rows : List.of(
                        metadata.getTables(null, null, "%", new String[] {"TABLE", "VIEW"}),
                        metadata.getColumns(null, "%", "%", "%"),
                        metadata.getPrimaryKeys(null, null, "described"),
                        metadata.getIndexInfo(null, null, "described", false, true),
                        metadata.getFunctions(null, "peergate", "%"),
                        metadata.getTypeInfo())) {
                    int width = rows.getMetaData().getColumnCount();
                    while (rows.next()) {
                        for (int i = 1; i <= width; i++) {
                            text.append(rows.getString(i)).append('|');
                        }
                        text.append('\n');
                    }
                }
                found.add(text.toString());
            }
        }
        expect(found.get(0).contains("described"), true);
        expect(found.get(0), found.get(1));
        execute(connection, "drop table described");
    }

    /** With autosave, the driver sets a savepoint before each statement and goes back to it when that fails. */
    static void autosave() throws SQLException {
        try (Connection connection = gate("autosave", "always")) {
            connection.setAutoCommit(false);
            execute(connection, "create peer saved from postgres with (host = 'h', user = 'u', validate = false)");
            fails(connection, "create peer saved from postgres with (host = 'h', user = 'u', validate = false)", "42710", 13);
            connection.commit();
            expect(peers(connection), List.of("kept", "saved"));
            execute(connection, "drop peer saved");
            connection.commit();
        }
    }

    public static void main(String[] arguments) throws Exception {
        for (String mode : List.of("extended", "simple", "extendedCacheEverything", "extendedForPrepared")) {
            try (Connection connection = gate("preferQueryMode", mode, "prepareThreshold", "5")) {
                plainSql(connection, mode.equals("simple"));
                transactions(connection);
                // In its simple mode the driver writes them into the text, in parentheses.
                parameters(connection);
                errors(connection);
                execute(connection, "drop peer kept");
            }
        }
        try (Connection connection = gate()) {
            execute(connection, "create peer kept from postgres with (host = 'h', user = 'u', validate = false)");
            cancel(connection);
            largeResult(connection);
            copy(connection);
            largeObjects(connection);
            metadata(connection);
            autosave();
        }
    }
}
