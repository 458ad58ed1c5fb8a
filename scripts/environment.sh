# Sourced by quickstart.sh and test.sh: make or reuse .venv at the repository's root and install the package
# with the given extra. Another interpreter: PYTHON=python3.12 bash scripts/test.sh

extra="$1"
if command -v flock > /dev/null; then # one script at a time; macOS has none
    exec 9>> .venv.lock
    flock --nonblock 9 || { echo "another script makes .venv: waiting for its end" >&2; flock 9; }
fi
recent='import sys; sys.exit(sys.version_info < (3, 10))'
# One that was stopped while it was made has a python, and no pip yet.
if [ ! -f .venv/installed-for ] && ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    "${PYTHON:-python3}" -c "$recent" \
        || { echo "error: Python 3.10 or newer is needed; set PYTHON to one" >&2; exit 1; }
    "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -c "$recent" \
    || { echo "error: .venv is of a Python before 3.10: remove it, and set PYTHON to a newer one" >&2; exit 1; }
# Installed already for the same settings? Then nothing needs the package index.
wanted="$extra $(cat setup.cfg pyproject.toml | cksum)"
if [ "$(cat .venv/installed-for 2>/dev/null)" != "$wanted" ]; then
    echo "installing mhla-diffusion[$extra] into .venv (torch is large: this can take some minutes)"
    # torch and torchvision first and together: their releases go in pairs.
    .venv/bin/python -m pip install --quiet torch torchvision
    .venv/bin/python -m pip install --quiet --editable ".[$extra]"
    echo "$wanted" > .venv/installed-for
fi
exec 9>&-
