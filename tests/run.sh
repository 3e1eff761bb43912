#!/bin/sh
# Runs the whole test suite; arguments go to pytest. Without root, or on another system than Linux, the tests of the
# lab are skipped, unless NETWEAVER_REQUIRE_LAB=1.
set -eu
cd "$(dirname "$0")/.."
. tests/prepare.sh
system=nothing
if [ "$(id -u)" = 0 ] && [ "$(uname)" = Linux ]; then system=tests; fi
prepare $system test
exec .venv/bin/python -m pytest "$@"
