#!/bin/bash
# Pack the environment into one file for train-bundle.sh; on a login node, again after every change of it.
# Edit: the value below, jobs/site.sh.
# Run: jobs/bundle.sh
#
# A rank reads about 1,200 files before its first step, times ranks, from one file system. The bundle is one file that
# train-bundle.sh sends to every node's own disk. It leaves out what no run reads: tests, headers, byte code of other
# Pythons. The Python interpreter itself is not in it: that comes from the system or a module on every node.
set -euo pipefail

BUNDLE=${BUNDLE:-hpcmlp-bundle.tar}     # file to write
LAUNCHER=none
# shellcheck source=jobs/site.sh
. "${SITE:-jobs/site.sh}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON[@]}" -m venv --without-pip --copies "$work/environment" 2>/dev/null ||
    "${PYTHON[@]}" -m venv --without-pip "$work/environment"
site=$("${PYTHON[@]}" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
own=$("$work/environment/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
package=$("${PYTHON[@]}" -c 'import hpcmlp, os; print(os.path.dirname(hpcmlp.__file__))')
copy() {        # copy FOLDER NAMES...: what a run reads
    tar -C "$1" -cf - --exclude=tests --exclude='*.pyx' --exclude='*.pxd' --exclude='*.h' --exclude='*.c' \
        --exclude='*.pyi' "${@:2}" | tar -C "$own" -xf -
}
names=()
for name in numpy numpy.libs mpi4py h5py h5py.libs cupy cupy_backends tqdm; do
    [ ! -e "$site/$name" ] || names+=("$name")
done
copy "$site" "${names[@]}"
copy "$(dirname "$package")" hpcmlp
# an MPI wheel's libraries, launcher and settings, where the environment has one
(
    cd "$HPCMLP_ENV"
    { find lib share bin/mpi* bin/hydra* bin/prte* bin/ompi* bin/pmix* \( -path 'lib/python*' -o -path 'share/man*' -o \
        -path 'share/doc*' -o -name '*.a' -o -name '*_abi*' \) -prune -o \( -type f -o -type l \) -print0 2>/dev/null || :; } |
        tar --null -T - -cf -
) | tar -C "$work/environment" -xf -
"$work/environment/bin/python" -m compileall -q "$own" || :
tar -C "$work" -cf "$BUNDLE.part" environment
mv "$BUNDLE.part" "$BUNDLE"
echo "wrote $BUNDLE: $(du -m "$BUNDLE" | cut -f1) MB, $(tar -tf "$BUNDLE" | wc -l) files"
