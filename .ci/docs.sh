#!/usr/bin/env bash
# Builds the site of docs/ strictly, in an environment that has the docs extra alone: neither sn_ops nor torch.
# usage: .ci/docs.sh [folder for the site]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" .ci/requirements.py docs >"$work/requirements.txt"
"$work/venv/bin/pip" install -q --disable-pip-version-check -r "$work/requirements.txt"
# Not --quiet: mkdocs then counts no warnings, and a strict build passes whatever is wrong.
"$work/venv/bin/mkdocs" build --strict --site-dir "${1:-$work/site}"
