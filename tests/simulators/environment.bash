# Sourced by the scripts beside it: what making a simulator's environment and playing in it have in common.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit 2; }

absolute() { mkdir -p "$(dirname "$1")"; (cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"); }   # of a folder that need not be there

checkout() {   # FOLDER, what it has to hold, what it is not when it does not -> its absolute path
    [ -e "$1/$2" ] || { echo "$1 $3: it has no $2" >&2; exit 1; }
    (cd "$1" && pwd)
}

make_environment() {   # NAME of its files here, packages that come without what they ask for; makes $env, sets $site
    local name=$1
    shift
    if [ ! -e "$env/ready" ]; then
        "${PYTHON:-python3}" -m venv "$env"
        "$env/bin/python" -m pip install -q --upgrade pip wheel "setuptools<81"
        "$env/bin/python" -m pip install -q -r "$here/$name.txt"
        [ $# -eq 0 ] || "$env/bin/python" -m pip install -q --no-deps "$@"
        touch "$env/ready"
    fi
    site=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    cp "$here/${name}_site.py" "$site/sitecustomize.py"
}

play() {   # BENCHMARK, POLICY or nothing, EPISODES, more options of emt evaluate
    local policy=$2 episodes=$3 asked=(--benchmark "$1" --python "$env/bin/python" "${@:4}")
    echo "ready: emt evaluate POLICY ${asked[*]}"
    [ -z "$policy" ] || exec "${EMT:-emt}" evaluate "$policy" "${asked[@]}" --episodes "$episodes" --workers 1 ${TASKS:+--tasks "$TASKS"} ${STAND_INS:+--run runs/stand-ins}   # whose results are nobody else's
}
