# Sourced by the other scripts: makes .venv when it is missing or out of date, and reuses it quietly when it is current.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# setup.cfg gives the ranges that work; these are the releases that were tested
TORCH="torch==2.13.0"
TRITON="triton==3.9.0"
VENV="${EMOE_VENV:-$PWD/.venv}"
WANTED=$(cat setup.cfg pyproject.toml scripts/environment.sh | sha256sum | cut -d' ' -f1)

if [ "$(cat "$VENV/.emoe-installed" 2>/dev/null)" != "$WANTED $PWD" ]; then
  PYTHON=$(command -v python3.11 || command -v python3 || true)
  if [ -z "$PYTHON" ] || ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "emoe needs Python 3.10 or newer (on Debian: apt-get install python3 python3-venv)" >&2
    exit 2
  fi
  echo "Installing into $VENV (first time only, about three minutes) ..." >&2
  "$PYTHON" -m venv "$VENV" || {
    echo "cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
    exit 2
  }
  LOG="$VENV/install.log"
  {
    "$VENV/bin/python" -m pip install --upgrade pip &&
      "$VENV/bin/python" -m pip install "$TORCH" &&
      "$VENV/bin/python" -m pip install -e ".[test]" "$TORCH" "$TRITON" &&
      "$VENV/bin/python" -m emoe_kernels.extension # compiles the CPU kernels; without a compiler it says so and goes on
  } >"$LOG" 2>&1 || {
    tail -n 20 "$LOG" >&2
    echo "installation failed; the whole log is in $LOG" >&2
    exit 1
  }
  echo "$WANTED $PWD" >"$VENV/.emoe-installed"
fi
export PATH="$VENV/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
