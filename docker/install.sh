#!/bin/sh
# The steps that install KalmaGrove in an image: docker/Dockerfile and docker/kalmagrove.def run them
# one by one, and the tests run the same steps in a clean folder.
#
#   docker/install.sh system     compiler and Python, through apt (root, Debian or Ubuntu)
#   docker/install.sh packages   the versions of requirements.lock, into $VENV
#   docker/install.sh project    this folder's kalmagrove, into $VENV
#   docker/install.sh kernels    CUDA kernels for the GPUs of $ARCHS; needs nvcc
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-/opt/kalmagrove/venv}
ARCHS=${ARCHS-90}           # compute capabilities: "80 90"; empty: kernels are compiled on first use
PYTHON=${PYTHON:-python3}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }

system() {
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    ca-certificates g++ python3 python3-dev python3-venv
  rm -rf /var/lib/apt/lists/*
}

packages() {
  test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
  DS_BUILD_OPS=0 pip install --requirement requirements.lock
}

project() {
  pip install --no-deps --no-build-isolation .
  "$VENV/bin/kalmagrove" --version
}

kernels() {
  for arch in $ARCHS; do
    "$VENV/bin/python" -m kalmagrove_kernels.prebuild --arch "$arch"
  done
}

case "${1:-}" in
  system | packages | project | kernels) "$1" ;;
  *) echo "usage: docker/install.sh system|packages|project|kernels" >&2; exit 2 ;;
esac
