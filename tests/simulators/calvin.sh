#!/usr/bin/env bash
# CALVIN (ABC-D, scene D) without Docker and without its data set: an environment of its own, headless, drawn by PyBullet on the CPU.
#
#   tests/simulators/calvin.sh ENVIRONMENT CALVIN CALVIN_ENV [POLICY [CHAINS]]
#
# ENVIRONMENT: folder of the environment, made if it is not there (about 2 GB; 8 GB where pip's torch is the one for CUDA)
# CALVIN, CALVIN_ENV: checkouts of github.com/mees/calvin and github.com/mees/calvin_env (MIT; the second holds the 31 MB of shapes and textures)
# POLICY: a policy folder, which then plays CHAINS chains of five tasks (1 by default) through `emt evaluate`
# PYTHON: the interpreter to make the environment with; 3.11 was tried
source "$(dirname "$0")/environment.bash"
[ $# -ge 3 ] || usage
env=$(absolute "$1")
calvin=$(checkout "$2" calvin_models/calvin_agent "is no checkout of github.com/mees/calvin")
calvin_env=$(checkout "$3" data/calvin_table_D "is no checkout of github.com/mees/calvin_env")
make_environment calvin torchvision   # of which only the transforms are used
printf '%s\n%s\n' "$calvin/calvin_models" "$calvin_env" > "$site/calvin.pth"

# the configuration of the scene, which otherwise comes with the data set
"$env/bin/python" -W ignore - "$calvin_env" "$env/scene_D" <<'PYTHON'
import sys
from pathlib import Path
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

source, out = map(Path, sys.argv[1:])
with initialize_config_dir(str(source / "conf"), version_base="1.1"):
    config = compose("config_data_collection", ["cameras=static_and_gripper", "scene=calvin_scene_D_eval", "use_vr=false", f"data_path={source / 'data'}"])
for name in set(config.cameras) - {"static", "gripper"}: del config.cameras[name]
(out / ".hydra").mkdir(parents=True, exist_ok=True)
OmegaConf.save(config, out / ".hydra" / "merged_config.yaml")
PYTHON

play calvin "${4:-}" "${5:-1}" --param "dataset_path=$env/scene_D"
