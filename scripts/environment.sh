# Sourced by quickstart.sh and test.sh: make or reuse .venv at the repository's root and install the package
# with the given extra. Another interpreter: PYTHON=python3.12 bash scripts/test.sh

extra="$1"
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || { echo "error: Python 3.10 or newer is needed; set PYTHON to one" >&2; exit 1; }
    "${PYTHON:-python3}" -m venv .venv
fi
# Installed already for the same settings? Then nothing needs the package index.
wanted="$extra $(cat setup.cfg pyproject.toml | cksum)"
if [ "$(cat .venv/installed-for 2>/dev/null)" != "$wanted" ]; then
    echo "installing mhla-diffusion[$extra] into .venv (torch is large: this can take some minutes)"
    # torch and torchvision first and together: their releases go in pairs.
    .venv/bin/python -m pip install --quiet torch torchvision
    .venv/bin/python -m pip install --quiet --editable ".[$extra]"
    echo "$wanted" > .venv/installed-for
fi
