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
source "$(dirname "$0")/environment.bash"
[ $# -ge 2 ] || usage
env=$(absolute "$1")
assets=$(checkout "$2" stable_scanned_objects "holds no assets of LIBERO")
make_environment libero robosuite==1.4.0 bddl==1.0.1 hf-libero==0.1.4
ln -sfn "$assets" "$site/libero/libero/assets"
mkdir -p "$env/libero_config"
for part in benchmark_root:. bddl_files:bddl_files init_states:init_files datasets:../datasets assets:assets; do echo "${part%%:*}: $site/libero/libero/${part#*:}"; done > "$env/libero_config/config.yaml"
[ -z "${STAND_INS:-}" ] || "$env/bin/python" "$here/libero_stand_ins.py" "$assets"

play libero_10 "${3:-}" "${4:-1}"
