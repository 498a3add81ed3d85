#!/usr/bin/env bash
# Puts PostgreSQL's own regression tests, of the given major version, into the given folder: fetch.sh 15 target/regress/15
#
# The tests come from the distribution's source package, the headers that their C functions are compiled with from its packages
# for extensions, which are unpacked, not installed: they would pull in a C compiler of another kind. What runs them comes with
# psql. Apt keeps what it downloads and its lists of sources within the folder. No root is needed. A complete folder is left alone.
set -euo pipefail
major=$1
folder=$(readlink -m "$2")
[[ -e "$folder/complete" ]] && exit 0
command -v apt-get >/dev/null || {
    echo "fetch: PostgreSQL's tests are fetched from Debian's or Ubuntu's packages, and there is no apt-get here" >&2
    exit 1
}
echo "fetch: getting the regression tests of PostgreSQL $major from this machine's distribution"
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"

# This machine's package sources, and the source packages beside them.
mkdir -p apt/sources apt/lists/partial apt/cache/archives/partial
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    if [[ -e "$file" ]]; then
        sed -e 's/^Types:.*/Types: deb deb-src/' -e 's/^deb \(.*\)/&\ndeb-src \1/' "$file" >"apt/sources/$(basename "$file")"
    fi
done
apt=(-q -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$folder/apt/sources" -o "Dir::State::lists=$folder/apt/lists"
    -o "Dir::Cache=$folder/apt/cache" -o "APT::Sandbox::User=$(id -un)")
# A place without source packages makes this fail; whether what is needed is there is seen below.
apt-get "${apt[@]}" update >apt/log 2>&1 || true

# The newest whose files are there: a mirror may list what it does not have.
fetched=
for version in $(apt-cache "${apt[@]}" showsrc "postgresql-$major" 2>>apt/log | sed -n 's/^Version: //p' | sort -Vru); do
    if apt-get "${apt[@]}" source --download-only "postgresql-$major=$version" >>apt/log 2>&1; then
        fetched=$version
        break
    fi
done
if [[ -z "$fetched" ]] || ! apt-get "${apt[@]}" download "postgresql-server-dev-$major" libpq-dev >>apt/log 2>&1; then
    cat apt/log >&2
    echo "fetch: the packages of PostgreSQL $major could not be downloaded; what apt said is above" >&2
    exit 1
fi

tar -xf postgresql-*.orig.tar.* --strip-components=4 --wildcards --one-top-level=tests '*/src/test/regress'
for package in *.deb; do
    dpkg-deb -x "$package" unpacked
done
cc -shared -fPIC -O1 -w -I "unpacked/usr/include/postgresql/$major/server" -I unpacked/usr/include/postgresql \
    -o tests/regress.so tests/regress.c
rm -rf unpacked apt ./*.deb postgresql-*
echo "$fetched" >complete
