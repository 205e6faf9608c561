#!/usr/bin/env bash
# install.sh PYTHON FOLDER: the programs that tests/e2e/clients drives, from PyPI and npm, into FOLDER.
set -euo pipefail
python=$1 folder=$2 here=$(cd "$(dirname "$0")" && pwd)

"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check -q -r "$here/requirements.txt"
# The tests run there too, with what they need of ours.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ingle-dev.pth"

if ! command -v npm >/dev/null; then
    echo 'npm is not here (Node.js 20 or newer): the clients written in JavaScript are left out' >&2
    exit 0
fi
mkdir -p "$folder/node"
cp "$here/node/package.json" "$folder/node"
npm install --prefix "$folder/node" --no-audit --no-fund --loglevel=error
# Each brings its binary as a package, and puts it in place by a script, which npm may not have run.
for package in @anthropic-ai/claude-code:install.cjs opencode-ai:postinstall.mjs; do
    (cd "$folder/node/node_modules/${package%:*}" && node "${package#*:}" >/dev/null)
done
