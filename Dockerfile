# One image with one binary. PostgreSQL comes along for the embedded catalog; with PEERGATE_CATALOG it is not used.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# The compiled crates stay in caches between builds; the binary has to leave them.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked -p gateway --bin peergate && cp target/release/peergate /usr/local/bin/peergate

FROM debian:bookworm-slim
# No cluster of the distribution's own: the embedded one lives in the volume.
RUN mkdir -p /etc/postgresql-common && echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        -o Dpkg::Options::=--force-confold postgresql-15 postgresql-client-15 ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --user-group --home-dir /var/lib/peergate --create-home --shell /usr/sbin/nologin peergate \
    && chmod 0700 /var/lib/peergate
COPY --from=build /usr/local/bin/peergate /usr/local/bin/peergate
USER peergate
# Within a container, loopback is nobody's way in.
ENV PEERGATE_LISTEN=0.0.0.0:9900 PEERGATE_DATA_DIR=/var/lib/peergate
VOLUME /var/lib/peergate
EXPOSE 9900
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["peergate", "healthcheck"]
ENTRYPOINT ["peergate"]
CMD ["serve"]
