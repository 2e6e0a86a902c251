#!/usr/bin/env bash
# LIBERO-10 without Docker: an environment of its own, headless, drawn by MuJoCo with OSMesa (Debian, Ubuntu: apt-get install libosmesa6).
#
#   tests/simulators/libero.sh ENVIRONMENT ASSETS [POLICY [EPISODES]]
#
# ENVIRONMENT: folder of the environment, made if it is not there (about 2 GB; 8 GB where pip's torch is the one for CUDA)
# ASSETS: LIBERO's shapes and textures, libero/libero/assets of github.com/Lifelong-Robot-Learning/LIBERO
# POLICY: a policy folder, which then plays EPISODES episodes (1 by default) of each of the ten tasks through `emt evaluate`
# PYTHON: the interpreter to make the environment with; 3.11 was tried
# TASKS: only these, separated by commas
# STAND_INS=1: draw boxes and grey for what ASSETS lacks (written into it), to try the plumbing; success then says nothing
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
absolute() { mkdir -p "$(dirname "$1")"; (cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"); }
here=$(cd "$(dirname "$0")" && pwd) env=$(absolute "$1") assets=$(cd "$2" && pwd)
[ -d "$assets/stable_scanned_objects" ] || { echo "$assets holds no assets of LIBERO: it has no stable_scanned_objects" >&2; exit 1; }

if [ ! -e "$env/ready" ]; then
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install -q --upgrade pip wheel "setuptools<81"
    "$env/bin/python" -m pip install -q -r "$here/libero.txt"
    "$env/bin/python" -m pip install -q --no-deps robosuite==1.4.0 bddl==1.0.1 hf-libero==0.1.4
    touch "$env/ready"
fi
site=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
cp "$here/libero_site.py" "$site/sitecustomize.py"
ln -sfn "$assets" "$site/libero/libero/assets"
mkdir -p "$env/libero_config"
for part in benchmark_root:. bddl_files:bddl_files init_states:init_files datasets:../datasets assets:assets; do echo "${part%%:*}: $site/libero/libero/${part#*:}"; done > "$env/libero_config/config.yaml"
[ -z "${STAND_INS:-}" ] || "$env/bin/python" "$here/libero_stand_ins.py" "$assets"

echo "ready: emt evaluate POLICY --benchmark libero_10 --python $env/bin/python"
[ $# -lt 3 ] || exec "${EMT:-emt}" evaluate "$3" --benchmark libero_10 --python "$env/bin/python" --episodes "${4:-1}" --workers 1 ${TASKS:+--tasks "$TASKS"}
