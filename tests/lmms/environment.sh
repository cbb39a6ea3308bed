#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A virtual environment with lmms-eval beside what another environment has: environment.sh FOLDER BASE
#
# BASE is an environment with plphp, torch and transformers, such as .venv. The new one looks into it for all that it
# does not have itself.
set -euo pipefail
folder=${1:?"usage: environment.sh FOLDER BASE"}
base=$(cd "${2:?"usage: environment.sh FOLDER BASE"}" && pwd)
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$folder/bin/python
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q --no-deps -r "$root/tests/lmms/requirements.txt"
"$folder/bin/pip" install -q --no-deps -e "$root"
# Last, so that pip above sees nothing of BASE.
echo "import site; site.addsitedir('$(packages "$base/bin/python")')" > "$(packages "$python")/base.pth"
"$python" -c "import lmms_eval.evaluator" || { echo "lmms-eval cannot be imported in $folder" >&2; exit 1; }
