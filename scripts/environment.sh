# Sourced by the scripts that set up a clone: `ensure_environment [extra]` makes `.venv` there with
# the package, and the extra, installed. What is already as pyproject.toml says is left alone.

ensure_environment() {
    local extra=${1:-} python=.venv/bin/python
    local system wanted stamp=.venv/.installed${extra:+-$extra}
    wanted="$PWD"$'\n'"$(<pyproject.toml)" # a moved clone needs its scripts written anew

    if ! "$python" -m pip --version >/dev/null 2>&1; then # none, left half-made, or its Python gone
        echo "Making a virtual environment in $PWD/.venv"
        system=$(find_python) && "$system" -m venv --clear .venv || return
    elif [[ -f $stamp && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "Installing the package${extra:+ with its $extra extra} into .venv:" \
        "a few minutes the first time, TensorFlow alone is over half a gigabyte"
    pip_install --editable ".${extra:+[$extra]}" || return
    printf '%s\n' "$wanted" | tee .venv/.installed >"$stamp"
}

pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}

find_python() {
    local python
    for python in python3 python3.{13,12,11,10}; do
        "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
            2>/dev/null || continue
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$python has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
        echo "$python"
        return
    done
    echo "Python 3.10 to 3.13 is needed; python3 here is" \
        "$(python3 --version 2>/dev/null || echo missing)" >&2
    return 1
}
