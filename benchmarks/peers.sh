#!/bin/sh
# Makes benchmarks/.venv-peers: the programs that ours is timed against, apart from our own environment (2.5 GB, several minutes).
#
#     sh benchmarks/peers.sh            PYTHON=python3.11 sh benchmarks/peers.sh
#
# Torch goes first, so that the rest takes the build that is there; it has the version of our own environment, so that a ratio compares
# programs and not matrix kernels.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/.venv-peers
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet trl==1.16.0 transformers==5.23.0 tokenizers==0.23.3 datasets==5.2.0 accelerate==1.15.0 numpy==2.4.6
"$venv/bin/pip" install --quiet stable-baselines3==2.9.2 "gymnasium[mujoco]==1.3.0" mujoco==3.3.0 numpy==2.4.6
# d3rlpy asks for an older Gymnasium than it needs.
"$venv/bin/pip" install --quiet --no-deps d3rlpy==2.8.1
"$venv/bin/pip" install --quiet structlog colorama click tqdm gym h5py dataclasses-json scikit-learn numpy==2.4.6
"$venv/bin/python" -c "import d3rlpy, stable_baselines3, torch, transformers, trl; print('peers: torch', torch.__version__, 'transformers', transformers.__version__, 'trl', trl.__version__)"
