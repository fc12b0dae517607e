# bash completion for llmstudioctl(1). tests/unit/test_completions.py holds it against the program's own parser.

# Prints the ids of the models, or the names of the keys: what is asked is the second argument. Nothing is asked where there is no socket, and nobody waits for more than two seconds.
# The daemon's sockets are systemd's, so asking starts a daemon that does not run; it starts no model.
_llmstudioctl_names() {
    local socket=${1:-${LLMSTUDIO_ADMIN_SOCKET:-/run/llmstudio/admin.sock}}
    [[ -S $socket ]] || return 0
    local -a question=(list --json)
    local field=id
    [[ ${2-} == keys ]] && question=(key list --json) field=name
    timeout 2 llmstudioctl --socket "$socket" "${question[@]}" 2>/dev/null |
        sed -n "s/^    \"$field\": \"\([^\"]*\)\",\{0,1\}\$/\\1/p"
}

_llmstudioctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} common="--json --socket --help"
    local command="" socket="" wants="" operands=0 options index word
    COMPREPLY=()

    # What stands before the cursor: the command, how many operands it has, and whether an option wants its value.
    # Readline splits --socket=PATH into three words.
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        case $wants:$word in
            *:=) ;;
            --socket:*) socket=$word wants="" ;;
            -?*:*) wants="" ;;
            :--socket) wants=--socket ;;
            :--lines | :-n) [[ $command == logs ]] && wants=--lines ;;
            :--id | :--set) [[ $command == recipe\ * ]] && wants=--n ;;
            :--models | :--expires) [[ $command == "key add" ]] && wants=$word ;;
            :--n-ctx | :--n-parallel | :--n-gpu-layers | :--n-ubatch | :--n-cpu-moe) [[ $command == estimate ]] && wants=--n ;;
            :--cache-type-[kv] | :--draft-model | :--mmproj) [[ $command == estimate ]] && wants=$word ;;
            :-*) ;;
            *)
                case $command in
                    "") command=$word ;;
                    key | recipe) command="$command $word" ;;
                    *) ((operands++)) ;;
                esac
                ;;
        esac
    done
    [[ $cur == = ]] && cur=""

    case $wants in
        --socket | --draft-model | --mmproj)
            compopt -o filenames 2>/dev/null
            mapfile -t COMPREPLY < <(compgen -f -- "$cur")
            return
            ;;
        --models) # names with commas between them: the last one is completed
            [[ $cur == *,* ]] && word=${cur%,*}, || word=""
            mapfile -t COMPREPLY < <(compgen -P "$word" -W "$(_llmstudioctl_names "$socket")" -- "${cur##*,}")
            return
            ;;
        --cache-type-?)
            mapfile -t COMPREPLY < <(compgen -W "f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl" -- "$cur")
            return
            ;;
        --lines | --expires | --n) return ;;
    esac

    case $command in
        "")
            if [[ $cur == -* ]]; then
                mapfile -t COMPREPLY < <(compgen -W "--version $common" -- "$cur")
            else
                mapfile -t COMPREPLY < <(compgen -W "list status load unload restart pin unpin cancel reset watch logs check explain estimate gpus key recipe web top reload doctor schema version" -- "$cur")
            fi
            return
            ;;
        explain) options="--dry-run $common" ;;
        list | status | restart | pin | unpin | cancel | reset | watch | check | gpus | reload | doctor | schema | version) options=$common ;;
        key | "key list" | "key revoke") options=$common ;;
        recipe | "recipe edit" | "recipe show" | "recipe delete") options=$common ;;
        "recipe new") options="--id --set --edit --force $common" ;;
        "recipe from-command") options="--save --id $common" ;;
        web) options="--no-open --sign-out $common" ;;
        top) options="--once $common" ;;
        "key add") options="--admin --metrics --models --expires $common" ;;
        estimate) options="--n-ctx --n-parallel --kv-unified --n-gpu-layers --cache-type-k --cache-type-v --n-ubatch --no-flash-attn --n-cpu-moe --draft-model --mmproj $common" ;;
        load) options="--no-wait $common" ;;
        unload) options="--all --force $common" ;;
        logs) options="--follow --lines -f -n $common" ;;
        *) return ;;
    esac

    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
        return
    fi
    case $command in
        status | load | unload | restart | pin | unpin | cancel | reset | logs | explain | "recipe edit" | "recipe show" | "recipe delete")
            ((operands == 0)) && mapfile -t COMPREPLY < <(compgen -W "$(_llmstudioctl_names "$socket")" -- "$cur")
            ;;
        key) mapfile -t COMPREPLY < <(compgen -W "add list revoke" -- "$cur") ;;
        recipe) mapfile -t COMPREPLY < <(compgen -W "new edit show delete from-command" -- "$cur") ;;
        "key revoke")
            ((operands == 0)) && mapfile -t COMPREPLY < <(compgen -W "$(_llmstudioctl_names "$socket" keys)" -- "$cur")
            ;;
        check | estimate | "recipe new")
            compopt -o filenames 2>/dev/null
            mapfile -t COMPREPLY < <(compgen -f -- "$cur")
            ;;
    esac
}

complete -F _llmstudioctl llmstudioctl
