#!/usr/bin/env bash
# CALVIN (ABC-D, scene D) without Docker and without its data set: an environment of its own, headless, drawn by PyBullet on the CPU.
#
#   tests/simulators/calvin.sh ENVIRONMENT CALVIN CALVIN_ENV [POLICY [CHAINS]]
#
# ENVIRONMENT: folder of the environment, made if it is not there (about 2 GB; 8 GB where pip's torch is the one for CUDA)
# CALVIN, CALVIN_ENV: checkouts of github.com/mees/calvin and github.com/mees/calvin_env (MIT; the second holds the 31 MB of shapes and textures)
# POLICY: a policy folder, which then plays CHAINS chains of five tasks (1 by default) through `emt evaluate`
# PYTHON: the interpreter to make the environment with; 3.11 was tried
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
absolute() { mkdir -p "$(dirname "$1")"; (cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"); }
here=$(cd "$(dirname "$0")" && pwd) env=$(absolute "$1") calvin=$(cd "$2" && pwd) calvin_env=$(cd "$3" && pwd)
[ -d "$calvin/calvin_models/calvin_agent" ] || { echo "$calvin is no checkout of github.com/mees/calvin: it has no calvin_models/calvin_agent" >&2; exit 1; }
[ -d "$calvin_env/data/calvin_table_D" ] || { echo "$calvin_env is no checkout of github.com/mees/calvin_env: it has no data/calvin_table_D" >&2; exit 1; }

if [ ! -e "$env/ready" ]; then
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install -q --upgrade pip wheel "setuptools<81"
    "$env/bin/python" -m pip install -q -r "$here/calvin.txt"
    "$env/bin/python" -m pip install -q --no-deps torchvision   # only its transforms are used
    site=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    cp "$here/calvin_site.py" "$site/sitecustomize.py"          # what CALVIN needs and cannot be installed today
    touch "$env/ready"
fi
site=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
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

echo "ready: emt evaluate POLICY --benchmark calvin --python $env/bin/python --param dataset_path=$env/scene_D"
[ $# -lt 4 ] || exec "${EMT:-emt}" evaluate "$4" --benchmark calvin --python "$env/bin/python" --episodes "${5:-1}" --workers 1 --param "dataset_path=$env/scene_D"
