#!/usr/bin/env bash
# SimplerEnv-Bridge on ManiSkill3 without Docker: an environment of its own, headless, drawn by SAPIEN with Mesa's lavapipe, a Vulkan on the CPU
# (24.3 or newer; Debian 12 has one among its backports: apt-get install -t bookworm-backports mesa-vulkan-drivers).
#
#   tests/simulators/simpler.sh ENVIRONMENT REAL2SIM WIDOWX [POLICY [EPISODES]]
#
# ENVIRONMENT: folder of the environment, made if it is not there (about 2 GB; 8 GB where pip's torch is the one for CUDA)
# REAL2SIM, WIDOWX: checkouts of github.com/simpler-env/ManiSkill2_real2sim and github.com/haosulab/ManiSkill-WidowX250S: things, tables and photographs; the robot
# POLICY: a policy folder, which then plays EPISODES episodes (1 by default) of each of the four tasks through `emt evaluate`
# PYTHON: the interpreter to make the environment with; 3.11 was tried
# TASKS: only these, separated by commas
# SIMPLER_LAVAPIPE_ICD: the file (lvp_icd*.json) of another lavapipe than the system's
# STAND_INS=1: a slab and plain colours for what REAL2SIM lacks (in ENVIRONMENT, the checkout stays as it is), to try the plumbing; success then says nothing
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
absolute() { mkdir -p "$(dirname "$1")"; (cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"); }
here=$(cd "$(dirname "$0")" && pwd) env=$(absolute "$1") real2sim=$(cd "$2" && pwd) widowx=$(cd "$3" && pwd)
[ -d "$real2sim/data/custom/models" ] || { echo "$real2sim is no checkout of github.com/simpler-env/ManiSkill2_real2sim: it has no data/custom/models" >&2; exit 1; }
[ -e "$widowx/wx250s.urdf" ] || { echo "$widowx is no checkout of github.com/haosulab/ManiSkill-WidowX250S: it has no wx250s.urdf" >&2; exit 1; }

if [ ! -e "$env/ready" ]; then
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install -q --upgrade pip wheel "setuptools<81"
    "$env/bin/python" -m pip install -q -r "$here/simpler.txt"
    touch "$env/ready"
fi
site=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
cp "$here/simpler_site.py" "$site/sitecustomize.py"
"$env/bin/python" "$here/simpler_assets.py" "$env/assets" "$real2sim" "$widowx" ${STAND_INS:+--stand-ins}

echo "ready: emt evaluate POLICY --benchmark simpler_bridge_ms3 --python $env/bin/python"
[ $# -lt 4 ] || exec "${EMT:-emt}" evaluate "$4" --benchmark simpler_bridge_ms3 --python "$env/bin/python" --episodes "${5:-1}" --workers 1 ${TASKS:+--tasks "$TASKS"}
