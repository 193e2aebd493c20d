#!/bin/sh
# Makes the virtual environment of the Makefile's targets, or leaves it alone when it is finished and up to date.
#
#   tools/venv.sh DIR             PYTHON, TORCH, TORCH_INDEX and CI are read from the environment (see `make help`)
#   tools/venv.sh --remove DIR    removes it, if this script made it
#
# DIR/asked     written first: what was asked for; a folder without it is somebody else's and is never touched
# DIR/finished  written last: a checksum of what was installed; an interrupted installation has none and starts anew

set -eu

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

check_ours() {  # a folder that is missing or empty is ours too
    if [ -f "$venv/asked" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ]; then return; fi
    die "$venv exists and make did not make it, so make does not touch it." \
        "Move it away, or name another folder: make VENV=.venv-make ..."
}

remove() {  # `asked` last: interrupted, what is left is still known as ours
    [ ! -d "$venv" ] || find "$venv" -mindepth 1 -maxdepth 1 ! -name asked -exec rm -rf {} +
    rm -rf "$venv"
}

if [ "$1" = --remove ]; then
    venv=$2
    check_ours
    remove
    exit
fi
venv=$1

# ------------------------------------------------------------------------------------------------- what is asked for

asked() { sed -n "s|^$1=||p" "$venv/asked" 2>/dev/null || true; }

if [ -z "${TORCH-}${TORCH_INDEX-}" ]; then  # not given: as before
    TORCH=$(asked TORCH)
    TORCH_INDEX=$(asked TORCH_INDEX)
fi
TORCH=${TORCH:-pypi} TORCH_INDEX=${TORCH_INDEX-} PYTHON=${PYTHON:-$(asked PYTHON)}
case $TORCH in
pypi) ;;
system) [ -z "$TORCH_INDEX" ] || die "TORCH=system installs no torch, so it goes without TORCH_INDEX=$TORCH_INDEX" ;;
*) die "TORCH=$TORCH: choose pypi (the default) or system" ;;
esac

same_settings=no
if [ "$TORCH|$TORCH_INDEX|$PYTHON" = "$(asked TORCH)|$(asked TORCH_INDEX)|$(asked PYTHON)" ]; then
    same_settings=yes
fi
# What the compiled libraries are made from and with counts too: a compiler that was installed since is used.
contents=$({
    cat pyproject.toml setup.py constraints.txt alexnet_kernels/_version.py tools/venv.sh csrc/*.*
    command -v "${CXX:-g++}" nvcc || true
    echo "${ALEXNET_KERNELS_BUILD:-auto}"
} | cksum)

if [ $same_settings = yes ] && [ "$(cat "$venv/finished" 2>/dev/null)" = "$contents" ]; then exit; fi
check_ours
if [ ! -f "$venv/finished" ] && kill -0 "$(asked PROCESS)" 2>/dev/null; then
    die "Process $(asked PROCESS) is making $venv: wait for it, or stop it, then run make again."
fi

# ----------------------------------------------------------------------------------------------------- which Python

# Prints why the given Python does not do, or nothing. Each is run, not only looked up: a shim may exist and fail.
why_not() {
    command -v "$1" >/dev/null 2>&1 || { echo "not found"; return; }
    "$1" - "$TORCH" 2>/dev/null <<'END' || echo "does not run"
import sys

version = ".".join(map(str, sys.version_info[:2]))
if not (3, 10) <= sys.version_info[:2] <= (3, 14):
    print("is Python " + version + "; 3.10 to 3.14 do")
    raise SystemExit
try:
    import ensurepip, venv
except ImportError:
    print("has no venv; on Debian and Ubuntu: sudo apt install python" + version + "-venv")
    raise SystemExit
if sys.argv[1] == "system":
    try:
        from torch import __version__ as torch_version
    except Exception as error:
        print("cannot import torch, which TORCH=system asks for: " + str(error))
        raise SystemExit
    if tuple(int(part) for part in torch_version.split(".")[:2]) < (2, 10):
        print("has torch " + torch_version + "; 2.10 or newer does")
END
}

find_python() {  # sets $python
    if [ -n "$PYTHON" ]; then set -- "$PYTHON"; else set -- python3.11 python3.12 python3.13 python3.10 python3.14 python3; fi
    reasons=
    for python in "$@"; do
        reason=$(why_not "$python")
        [ -n "$reason" ] || return 0
        reasons="$reasons
  $python $reason"
    done
    die "No suitable Python:$reasons" "Name another one: make PYTHON=/path/to/python ..."
}

update=no
if [ $same_settings = yes ] && [ -f "$venv/finished" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    update=yes python=$PYTHON
else
    find_python
fi

# ------------------------------------------------------------------------------------------------ what it will cost

if [ $update = yes ]; then
    echo "Bringing $venv up to date: what it was made from has changed. Mostly nothing large is downloaded."
else
    if [ "$TORCH" = system ]; then
        size="about 0.2 GB to download and 0.6 GB on disk (torch stays where it is; 0.2 and 0.6 more if triton is missing)"
    elif [ -n "$TORCH_INDEX" ]; then
        size="torch from $TORCH_INDEX; with a CPU build about 0.6 GB to download and 2 GB on disk"
    else
        size="about 2.6 GB to download and 5 GB on disk (on Linux, where PyPI's torch is the CUDA build; it runs without a GPU)"
    fi
    echo "Making $venv with $python: $size."
    echo "pip keeps the downloads in its cache besides (PIP_NO_CACHE_DIR=1: it does not). Free here:" \
        "$(df -Pk . | awk 'NR == 2 {printf "%.0f GB", $4 / 1e6}')."
fi

# -------------------------------------------------------------------------------------------------------- install

trap 'echo "$venv is not finished: the next make starts it anew." >&2' EXIT
trap 'exit 130' INT TERM

note_asked() { printf '%s\n' "PYTHON=$python" "TORCH=$TORCH" "TORCH_INDEX=$TORCH_INDEX" "PROCESS=$$" >"$venv/asked"; }

if [ $update = yes ]; then
    note_asked
    rm -f "$venv/finished"
else
    remove
    mkdir -p "$venv"
    note_asked
    if [ "$TORCH" = system ]; then
        "$python" -m venv --system-site-packages "$venv"
        # When PYTHON is itself a virtual environment, "system" is not it but the Python below it: point at its packages.
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib")); print(sysconfig.get_path("platlib"))' \
            >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth"
    else
        "$python" -m venv "$venv"
    fi
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
install() { "$venv/bin/python" -m pip install ${CI:+--quiet} "$@"; }

constraints=constraints.txt
if [ "$TORCH" = system ]; then
    # Of the tested stack, torch and its kin are pinned to what is there, so that pip replaces none of it.
    constraints=$venv/constraints.txt
    "$venv/bin/python" - >"$constraints" <<'END'
import re
from importlib.metadata import PackageNotFoundError, version

for line in open("constraints.txt"):
    name = re.match(r"[\w.-]*", line).group()
    try:
        print(f"{name}=={version(name)}" if name in ("torch", "torchvision", "triton") else line.strip())
    except PackageNotFoundError:
        if name == "triton":
            print(line.strip())
END
fi

install "setuptools>=77,<82" wheel ninja
if [ -n "$TORCH_INDEX" ]; then
    # First and together: torchvision's compiled half must come from where torch does. A build such as 2.11.0+cpu
    # satisfies the pin torch==2.11.0, now and in the installation below, which therefore leaves it alone.
    install --index-url "$TORCH_INDEX" -c "$constraints" torch torchvision
elif [ "$TORCH" != system ]; then
    install -c "$constraints" torch # first: the compiled libraries are built against it
fi
install --no-build-isolation -c "$constraints" -e ".[dev]"

echo "$contents" >"$venv/finished"
trap - EXIT
echo "$venv is finished: $("$venv/bin/python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
