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
source "$(dirname "$0")/environment.bash"
[ $# -ge 3 ] || usage
env=$(absolute "$1")
real2sim=$(checkout "$2" data/custom/models "is no checkout of github.com/simpler-env/ManiSkill2_real2sim")
widowx=$(checkout "$3" wx250s.urdf "is no checkout of github.com/haosulab/ManiSkill-WidowX250S")
make_environment simpler
"$env/bin/python" "$here/simpler_assets.py" "$env/assets" "$real2sim" "$widowx" ${STAND_INS:+--stand-ins}

play simpler_bridge_ms3 "${4:-}" "${5:-1}"
