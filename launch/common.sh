# Shared by the scripts of this folder, which source it: never run.
# shellcheck shell=bash
#
# Takes --dry-run and --help out of the arguments, goes to the root of the checkout, and
# stops at the first command that fails.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# The comment at the top of the script is its help.
help() { sed -n '3,${/^#/!q;/^# shellcheck/q;s/^# \{0,1\}//p}' "launch/${0##*/}"; }

# Quotes words for any shell, a word only where it needs it.
quote() {
  local word separator=
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# Runs a command; in a dry run prints it as it can be pasted.
run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# need NAME=EXAMPLE ...: refuses, naming all of them that are not set.
need() {
  local pair name missing=() examples=()
  for pair in "$@"; do
    name=${pair%%=*}
    [[ -n ${!name:-} ]] && continue
    missing+=("$name")
    examples+=("$pair")
  done
  ((${#missing[@]} == 0)) || fail "set ${missing[*]}, for example: \
${examples[*]} launch/${0##*/} ${command:-}"
}

# Sets `program`: main.py on WORKDIR, or another program of several processes, as in
# MODULE="sra2_jax sample", which says in its arguments where it writes.
# shellcheck disable=SC2034 # read where this is sourced
choose_program() {
  if [[ -n ${MODULE:-} ]]; then
    # shellcheck disable=SC2206 # its words, such as sra2_jax and sample
    program=("$1" -m $MODULE)
  else
    need WORKDIR="$2"
    program=("$1" main.py --workdir="$WORKDIR")
  fi
}

# Is a program that ended so worth starting again? 42: it stopped and asks for it;
# above 128: a signal ended it, on a machine that is taken away, or where another
# process of the job was lost. Not 130, Ctrl-C; 2 is a mistake of the user.
restartable() { (($1 == 42 || ($1 > 128 && $1 != 130))); }

words=()
for word in "$@"; do
  case $word in
    --dry-run) export DRY_RUN=1 ;;
    --help)
      help
      exit 0
      ;;
    *) words+=("$word") ;;
  esac
done
set -- ${words[@]+"${words[@]}"} # the arguments of the script that sources this
