# What run.sh and test.sh begin with: bash, this folder, and .venv with the pinned packages. Up to `set +o posix` any sh
# reads this.
if [ -z "${BASH_VERSION:-}" ]; then
    command -v bash >/dev/null || { echo "error: $0 needs bash: install it" >&2; exit 2; }
    exec bash "$0" "$@"
fi
set +o posix # where sh is bash before 5.1, it lacks >( ) otherwise
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")"
script=./$(basename -- "$0")

stop() {
    echo "error: $1" >&2
    exit 2
}

# The version of a Python, such as 3.12, or nothing if it does not start. Python 2 reads this too.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

supported() { [[ $1 =~ ^3\.1[0-4]$ ]]; }

# Set `version` to that of `python`, or stop.
check_python() {
    local needed="Python 3.10 to 3.14 is needed; to use another: PYTHON=python3.12 $script"
    version=$(version_of "$python")
    [ -n "$version" ] || stop "$python was not found or does not start: $needed"
    supported "$version" || stop "$python is Python $version: $needed"
}

# Print why .venv cannot be used, or nothing. $1: the version it must have, or empty for any.
find_fault() {
    local version
    version=$(version_of .venv/bin/python)
    if [ -z "$version" ]; then
        echo "its Python does not start"
    elif ! supported "$version"; then
        echo "it has Python $version"
    elif [ -n "$1" ] && [ "$1" != "$version" ]; then
        echo "it has Python $version, not $1"
    elif [ ! -d ".venv/lib/python$version/site-packages" ]; then
        echo "its packages are for another Python than $version"
    elif ! (. .venv/bin/activate && [ "$VIRTUAL_ENV" -ef .venv ]) 2>/dev/null; then
        echo "it was made in another folder"
    elif ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        echo "it has no pip"
    fi
}

# Make .venv and install what the first file names, where that is still to do.
# Usage: set_up MARKER FILE [FILES THAT IT READS…]
set_up() {
    local marker=.venv/$1 python=${PYTHON:-python3} version="" fault="" base wanted package
    shift
    [ "${OS:-}" != Windows_NT ] || stop "$script needs Linux, macOS or WSL"

    # Python is checked before anything is made or removed. A .venv that works needs no other, if none is named.
    [ -z "${PYTHON:-}" ] || check_python
    [ ! -e .venv ] || fault=$(find_fault "$version")
    if [ ! -e .venv ] || [ -n "$fault" ]; then
        check_python
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            stop "$python has no venv module: install it (on Debian and Ubuntu: apt install python$version-venv)"
        [ -z "$fault" ] || echo "Making .venv anew with Python $version: $fault"
        # --clear, not rm: $python may be .venv's own, where that is active.
        if ! "$python" -m venv --clear .venv; then
            rm -rf .venv
            stop "$python could not make .venv, see above"
        fi
    fi

    # A marker holds the requirements that were installed, and is there only while all of them are.
    base=$(cat requirements.txt) wanted=$(cat "$@")
    [ "$wanted" != "$(cat "$marker" 2>/dev/null)" ] || return 0
    rm -f .venv/.installed .venv/.installed-dev
    # pip writes a package's RECORD last. It takes one without for installed, and cannot remove it later.
    for package in .venv/lib/python*/site-packages/*.dist-info; do
        [ -f "$package/RECORD" ] || rm -rf "$package"
    done
    echo "Installing the packages of $1 into .venv"
    .venv/bin/python -m pip install --quiet --upgrade -r "$1" ||
        stop "pip could not install the packages of $1, see above; $script again continues"
    echo "$base" >.venv/.installed
    echo "$wanted" >"$marker"
}
