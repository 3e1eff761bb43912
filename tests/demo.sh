#!/bin/sh
# Shows netweaver at work: a lab of network namespaces on this machine, as root. The line that begins with a brace is the JSON.
set -eu
cd "$(dirname "$0")/.."
. tests/prepare.sh
if [ "$(id -u)" != 0 ]; then
    echo "demo: please run this as root: the lab is made of network namespaces" >&2
    exit 1
fi
prepare lab ""
exec .venv/bin/python tests/laboratory.py sh -c '
    set -- .venv/bin/python netweaver.py -n "$LAB_NAME" --hv "$LAB_HV" -s "$LAB_SOURCE" -d "$LAB_DESTINATION" \
        -i eth0 --num 0 -k "$LAB_KEY" -c 100
    echo "\$ $*"
    exec "$@"'
