//! Sources that want TLS, certificates and passwords: what works, and how what does not is told.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use catalog::cluster::StopMode;
use catalog::connect::check_peer;
use catalog::peer::GivenPeer;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SignatureAlgorithm};

use crate::support::{Fixture, ask, start_servers};

/// The name in the server's certificate. Nothing resolves it: `hostaddr` says where it is.
const NAME: &str = "shop.example";

const PASSWORD: &str = "it's secret";

/// Who may come in, and how: the tests' own superuser as always, the others as their names say.
const HBA: &str = "
    local    all  all                     trust
    host     all  postgres   127.0.0.1/32 trust
    host     all  hashed     127.0.0.1/32 md5
    hostssl  all  certified  127.0.0.1/32 scram-sha-256 clientcert=verify-ca
    hostssl  all  all        127.0.0.1/32 scram-sha-256
";

/// A server that offers TLS, an engine, and the files of certificates.
struct Stage {
    fixture: Fixture,
    folder: PathBuf,
}

/// How the server's certificate is made.
enum ServerCertificate {
    /// Signed by the authority in `ca.crt`.
    Signed(&'static SignatureAlgorithm),
    /// Signed by itself, as PostgreSQL's documentation shows; `ca.crt` is the same certificate.
    SelfSigned { authority: bool, names: &'static [&'static str] },
}

impl Stage {
    async fn start(certificate: ServerCertificate) -> Stage {
        let mut fixture = start_servers(&[]).await;
        let folder = fixture.cluster.directory().to_owned();
        let data = folder.join("pgdata");
        let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
        let key = |name: &str, algorithm: &'static SignatureAlgorithm| {
            let key = KeyPair::generate_for(algorithm).unwrap();
            write(name, key.serialize_pem());
            private(&folder.join(name), &data);
            key
        };
        let ecdsa = &rcgen::PKCS_ECDSA_P256_SHA256;
        let authority = |name: &str, algorithm| {
            let mut params = params(name, &[]);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            CertifiedIssuer::self_signed(params, KeyPair::generate_for(algorithm).unwrap()).unwrap()
        };
        let clients = authority("clients", ecdsa);
        write("clients.crt", clients.pem());
        write("other.crt", authority("other", ecdsa).pem());
        write("client.crt", params("certified", &[]).signed_by(&key("client.key", ecdsa), &clients).unwrap().pem());
        match certificate {
            ServerCertificate::Signed(algorithm) => {
                // The authority's signature is what the channel binding's hash comes from.
                let ca = authority("ca", algorithm);
                write("ca.crt", ca.pem());
                write("server.crt", params(NAME, &[NAME]).signed_by(&key("server.key", ecdsa), &ca).unwrap().pem());
            }
            ServerCertificate::SelfSigned { authority, names } => {
                let mut params = params(NAME, names);
                if authority {
                    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                }
                let certificate = params.self_signed(&key("server.key", ecdsa)).unwrap().pem();
                write("ca.crt", certificate.clone());
                write("server.crt", certificate);
            }
        }
        std::fs::write(data.join("pg_hba.conf"), HBA).unwrap();
        for (setting, file) in
            [("ssl_cert_file", "server.crt"), ("ssl_key_file", "server.key"), ("ssl_ca_file", "clients.crt")]
        {
            let path = folder.join(file);
            fixture.control.batch_execute(&format!("alter system set {setting} = '{}'", path.display())).await.unwrap();
        }
        fixture.control.batch_execute("alter system set ssl = on").await.unwrap();
        let roles = "set password_encryption = 'scram-sha-256'; create role secured superuser login password 'it''s secret';
            create role certified superuser login password 'it''s secret';
            set password_encryption = 'md5'; create role hashed superuser login password 'it''s secret'; reset password_encryption";
        fixture.control.batch_execute(roles).await.unwrap();
        fixture = fixture.restart_servers(StopMode::Fast).await;
        fixture.source.batch_execute("create table t (id int primary key, v text)").await.unwrap();
        fixture.start_engine("node-1");
        Stage { fixture, folder }
    }

    /// Options of a peer on the server: `more` on top of, and instead of, those of the role `secured`.
    fn options(&self, more: &[(&str, &str)]) -> GivenPeer {
        let port = self.fixture.cluster.port().to_string();
        let common = [
            ("host", NAME),
            ("hostaddr", "127.0.0.1"),
            ("port", &port),
            ("user", "secured"),
            ("password", PASSWORD),
            ("database", "shop"),
        ];
        let common = common.iter().filter(|(name, _)| more.iter().all(|(other, _)| other != name));
        // An empty value stands for an option that is not given; files are in our folder.
        let given = common.chain(more).filter(|(_, value)| !value.is_empty()).map(|(name, value)| {
            let is_file = ["sslrootcert", "sslcert", "sslkey"].contains(name);
            let value = if is_file { self.folder.join(value).display().to_string() } else { (*value).to_owned() };
            ((*name).to_owned(), value)
        });
        GivenPeer::new(given.collect()).unwrap()
    }

    async fn create_mirror(&self, peer: &GivenPeer) {
        let sealed = peer.sealed(self.fixture.catalog.keyring()).unwrap();
        let create = "call peergate.create_peer('p', 'postgres', $1, $2)";
        self.fixture
            .control
            .execute(create, &[&peer.options(), &sealed as &(dyn tokio_postgres::types::ToSql + Sync)])
            .await
            .unwrap();
        let create = r#"call peergate.create_mirror('m', 'p', 'dwh', '{"all": true}', '{"truncate_target": "true"}')"#;
        self.fixture.control.batch_execute(create).await.unwrap();
    }

    async fn drop_mirror(&self) {
        self.fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
        self.fixture.control.batch_execute("call peergate.drop_peer(array['p'])").await.unwrap();
    }

    /// Copies and streams with these options, and tells whether that went over TLS.
    async fn mirrors(&self, more: &[(&str, &str)]) -> bool {
        eprintln!("{more:?}");
        let peer = self.options(more);
        check_peer(&peer.peer_options()).await.unwrap();
        self.create_mirror(&peer).await;
        self.fixture.caught_up().await;
        let next = "insert into t select coalesce(max(id), 0) + 1, repeat('x', 100000) from t";
        self.fixture.source.batch_execute(next).await.unwrap();
        self.fixture.caught_up().await;
        self.fixture.assert_equal().await;
        let encrypted =
            "select string_agg(distinct s.ssl::text, ' ') from pg_stat_ssl s join pg_stat_activity a using (pid)
            where a.backend_type = 'walsender' or (a.datname = 'shop' and a.application_name = 'peergate')";
        let encrypted = ask(&self.fixture.source, encrypted).await;
        self.drop_mirror().await;
        self.fixture.wait_until("select count(*) from peergate.mirror_drops", "0").await;
        match encrypted.as_str() {
            "true" => true,
            "false" => false,
            other => panic!("encrypted: {other}"),
        }
    }

    /// Tries with these options, which must fail in the same way wherever it is tried; returns what is told.
    async fn refused(&self, more: &[(&str, &str)]) -> String {
        let peer = self.options(more);
        let at_once = check_peer(&peer.peer_options()).await.unwrap_err();
        self.create_mirror(&peer).await;
        self.fixture.wait_until("select error_message is not null from peergate.mirror_status", "t").await;
        let told = "select concat_ws(' | ', state, error_sqlstate, error_message, error_detail, error_hint) from peergate.mirror_status";
        let told = self.fixture.ask(told).await;
        assert!(told.contains(&at_once.message), "{told}\n{at_once}");
        let everything = "select string_agg(t, E'\\n') from (select to_jsonb(e)::text from peergate.mirror_events e union all select to_jsonb(e)::text from peergate.tasks e
            union all select to_jsonb(e)::text from peergate.task_log e union all select to_jsonb(e)::text from peergate.mirror_runtime e) x (t)";
        let everything = self.fixture.ask(everything).await;
        assert!(everything.contains("retrying"), "{everything}");
        assert!(!everything.contains("secret"), "{everything}");
        self.drop_mirror().await;
        told
    }
}

fn params(name: &str, names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// Makes a file one of the user that the server runs as, for nobody else to read.
fn private(path: &Path, data: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let owner = std::fs::metadata(data).unwrap();
    chown(path, Some(owner.uid()), Some(owner.gid())).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sslmode_works_that_the_server_and_its_certificate_allow() {
    let stage = Stage::start(ServerCertificate::Signed(&rcgen::PKCS_ECDSA_P256_SHA256)).await;
    let full = [("sslmode", "verify-full"), ("sslrootcert", "ca.crt")];
    assert!(stage.mirrors(&full).await);
    assert!(stage.mirrors(&[full[0], full[1], ("channel_binding", "require")]).await);
    assert!(stage.mirrors(&[full[0], full[1], ("channel_binding", "disable")]).await);
    // As PeerDB says it, and with the certificate's name given apart.
    let text = std::fs::read_to_string(stage.folder.join("ca.crt")).unwrap();
    assert!(
        stage
            .mirrors(&[
                ("host", "127.0.0.1"),
                ("hostaddr", ""),
                ("tls_host", NAME),
                ("require_tls", "true"),
                ("root_ca", &text)
            ])
            .await
    );
    let elsewhere = [("host", "localhost"), ("hostaddr", "")];
    assert!(stage.mirrors(&[elsewhere[0], elsewhere[1], ("sslmode", "verify-ca"), full[1]]).await);
    assert!(stage.mirrors(&[elsewhere[0], elsewhere[1], ("sslmode", "require"), full[1]]).await);
    for mode in ["require", "prefer", "allow"] {
        assert!(stage.mirrors(&[elsewhere[0], elsewhere[1], ("sslmode", mode)]).await);
    }
    assert!(stage.mirrors(&elsewhere).await);
    // Who may come without TLS is not held to it.
    let open = [("user", "postgres"), ("password", "")];
    assert!(!stage.mirrors(&[open[0], open[1], ("sslmode", "disable")]).await);
    assert!(!stage.mirrors(&[open[0], open[1], ("sslmode", "allow")]).await);
    assert!(stage.mirrors(&open).await);
    let socket = stage.folder.join("run").display().to_string();
    assert!(!stage.mirrors(&[open[0], open[1], ("host", &socket), ("hostaddr", ""), ("sslmode", "require")]).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_told_and_tried_again() {
    let stage = Stage::start(ServerCertificate::Signed(&rcgen::PKCS_ECDSA_P256_SHA256)).await;
    for (more, expected) in [
        (
            &[("sslmode", "verify-full"), ("sslrootcert", "other.crt")][..],
            &["HV00N", "UnknownIssuer", "not signed by an authority in sslrootcert"][..],
        ),
        (&[("sslmode", "verify-ca"), ("sslrootcert", "other.crt")], &["HV00N", "UnknownIssuer"]),
        (&[("sslmode", "require"), ("sslrootcert", "other.crt")], &["HV00N", "UnknownIssuer"]),
        (
            &[("sslmode", "verify-full"), ("sslrootcert", "ca.crt"), ("host", "localhost"), ("hostaddr", "")],
            &["HV00N", "localhost", NAME],
        ),
        (&[("sslmode", "disable")], &["28000", "no pg_hba.conf entry", "secured"]),
        (&[("sslmode", "require"), ("password", "wrong secret")], &["28P01", "password authentication failed"]),
        (&[("password", "wrong secret")], &["28P01", "password authentication failed"]),
        (&[("password", "")], &["28P01", "asks for a password and none is given"]),
        (&[("user", "hashed"), ("channel_binding", "require")], &["channel binding"]),
        (&[("user", "certified")], &["28000", "client certificate"]),
    ] {
        let told = stage.refused(more).await;
        eprintln!("{told}");
        assert!(told.starts_with("retrying | "), "{more:?}: {told}");
        for part in expected {
            assert!(told.contains(part), "{more:?}: {told} lacks {part}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates_and_md5_passwords_work() {
    let stage = Stage::start(ServerCertificate::Signed(&rcgen::PKCS_ECDSA_P256_SHA256)).await;
    let certificate = [("user", "certified"), ("sslcert", "client.crt"), ("sslkey", "client.key")];
    assert!(stage.mirrors(&certificate).await);
    assert!(
        stage.mirrors(&[&certificate[..], &[("sslmode", "verify-full"), ("sslrootcert", "ca.crt")]].concat()).await
    );
    assert!(stage.mirrors(&[("user", "hashed")]).await);
    assert!(!stage.mirrors(&[("user", "hashed"), ("sslmode", "disable")]).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_signed_by_themselves_are_their_own_authority() {
    for (authority, names) in [(true, &[NAME][..]), (true, &[]), (false, &[])] {
        let stage = Stage::start(ServerCertificate::SelfSigned { authority, names }).await;
        for mode in ["verify-full", "verify-ca", "require"] {
            assert!(stage.mirrors(&[("sslmode", mode), ("sslrootcert", "ca.crt")]).await);
        }
        let told = stage
            .refused(&[("sslmode", "verify-full"), ("sslrootcert", "ca.crt"), ("host", "localhost"), ("hostaddr", "")])
            .await;
        assert!(told.contains("localhost"), "{told}");
        stage.refused(&[("sslmode", "verify-ca"), ("sslrootcert", "other.crt")]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_with_other_signatures_work() {
    for (algorithm, binds) in [(&rcgen::PKCS_ECDSA_P384_SHA384, true), (&rcgen::PKCS_ED25519, false)] {
        let stage = Stage::start(ServerCertificate::Signed(algorithm)).await;
        let full = [("sslmode", "verify-full"), ("sslrootcert", "ca.crt")];
        assert!(stage.mirrors(&full).await);
        if binds {
            assert!(stage.mirrors(&[full[0], full[1], ("channel_binding", "require")]).await);
        }
    }
}
