# fish completion for llmstudioctl(1). tests/unit/test_completions.py holds it against the program's own parser.

# Prints what is given with --socket, in either form.
function __llmstudioctl_socket
    set -l words (commandline -opc)
    string replace -rf -- '^--socket=' '' $words
    and return
    set -l index (contains -i -- --socket $words)
    and echo $words[(math $index + 1)] 2>/dev/null
end

# Succeeds when the command is one of those that are given, or when there is none yet and none is given.
function __llmstudioctl_command
    set -l words (commandline -opc)
    set -e words[1]
    set -l index (contains -i -- --socket $words)
    and set -e words[$index..(math $index + 1)]
    for word in $words
        string match -q -- '-*' $word
        and continue
        contains -- $word $argv
        return
    end
    test (count $argv) -eq 0
end

# Succeeds when the command of a group (`key`, `recipe`), which is given first, is one of the others that are given, or
# when there is none yet and no other is given.
function __llmstudioctl_below
    __llmstudioctl_command $argv[1]
    or return
    set -l words (commandline -opc)
    set -l index (contains -i -- --socket $words)
    and set -e words[$index..(math $index + 1)]
    set -e words[1..(contains -i -- $argv[1] $words)]
    for word in $words
        string match -q -- '-*' $word
        and continue
        contains -- $word $argv[2..-1]
        return
    end
    test (count $argv) -eq 1
end

# Prints what llmstudioctl lists, one a line: the field that is given first, of what the command that follows prints.
# Nothing is asked where there is no socket, and nobody waits for more than two seconds.
# The daemon's sockets are systemd's, so asking starts a daemon that does not run; it starts no model.
function __llmstudioctl_names
    set -l field $argv[1]
    set -l socket /run/llmstudio/admin.sock
    set -q LLMSTUDIO_ADMIN_SOCKET
    and set socket $LLMSTUDIO_ADMIN_SOCKET
    set -l given (__llmstudioctl_socket)
    test -n "$given"
    and set socket $given
    test -S "$socket"
    or return 0
    timeout 2 llmstudioctl --socket $socket $argv[2..-1] --json 2>/dev/null |
        string replace -rf "^    \"$field\": \"([^\"]*)\",?\$" '$1'
end

complete -c llmstudioctl -f
complete -c llmstudioctl -l json -d 'print the answer as JSON'
complete -c llmstudioctl -l socket -r -F -d 'the admin socket'
complete -c llmstudioctl -s h -l help -d 'show a help text'
complete -c llmstudioctl -n __llmstudioctl_command -l version -d 'show its version'

complete -c llmstudioctl -n __llmstudioctl_command -a list -d 'list the models and their states'
complete -c llmstudioctl -n __llmstudioctl_command -a status -d 'show the daemon, or one model with its story'
complete -c llmstudioctl -n __llmstudioctl_command -a load -d 'load a model and wait until it is ready'
complete -c llmstudioctl -n __llmstudioctl_command -a unload -d 'unload a model when its requests are answered'
complete -c llmstudioctl -n __llmstudioctl_command -a restart -d 'unload a model, and load it again'
complete -c llmstudioctl -n __llmstudioctl_command -a pin -d 'keep a model loaded: it is never evicted nor unloaded for idleness'
complete -c llmstudioctl -n __llmstudioctl_command -a unpin -d 'let a model that was pinned go again'
complete -c llmstudioctl -n __llmstudioctl_command -a cancel -d 'give the load of a model up'
complete -c llmstudioctl -n __llmstudioctl_command -a reset -d 'let a model that failed be started again'
complete -c llmstudioctl -n __llmstudioctl_command -a watch -d 'print what happens to the models, as it happens'
complete -c llmstudioctl -n __llmstudioctl_command -a logs -d "show a model's log"
complete -c llmstudioctl -n __llmstudioctl_command -a check -d 'check recipe files, or everything that the daemon has loaded'
complete -c llmstudioctl -n __llmstudioctl_command -a explain -d 'show where a model would go, and how it would be started'
complete -c llmstudioctl -n __llmstudioctl_command -a estimate -d 'tell what a GGUF file needs in memory'
complete -c llmstudioctl -n __llmstudioctl_command -a gpus -d 'show the GPUs, who uses them, and RAM'
complete -c llmstudioctl -n __llmstudioctl_command -a key -d "make, list or revoke the endpoint's API keys"
complete -c llmstudioctl -n __llmstudioctl_command -a recipe -d 'make, edit, show or delete recipes'
complete -c llmstudioctl -n __llmstudioctl_command -a web -d 'print the address of the page, with a code that signs in'
complete -c llmstudioctl -n __llmstudioctl_command -a top -d 'show what the models do, as they do it'
complete -c llmstudioctl -n __llmstudioctl_command -a reload -d 'have settings, recipes and keys read again, now'
complete -c llmstudioctl -n __llmstudioctl_command -a doctor -d 'examine the installation, and tell what to do'
complete -c llmstudioctl -n __llmstudioctl_command -a schema -d 'print the JSON schema of recipes, for editors'
complete -c llmstudioctl -n __llmstudioctl_command -a version -d 'show the versions of this program, the daemon and llama-server'

complete -c llmstudioctl -n '__llmstudioctl_command status load unload restart pin unpin cancel reset logs explain' -a '(__llmstudioctl_names id list)' -d model
complete -c llmstudioctl -n '__llmstudioctl_command check estimate' -F
complete -c llmstudioctl -n '__llmstudioctl_command load' -l no-wait -d 'return at once'
complete -c llmstudioctl -n '__llmstudioctl_command unload' -l all -d 'unload every model'
complete -c llmstudioctl -n '__llmstudioctl_command unload' -l force -d 'do not wait for requests in flight'
complete -c llmstudioctl -n '__llmstudioctl_command logs' -s f -l follow -d 'go on with new lines'
complete -c llmstudioctl -n '__llmstudioctl_command logs' -s n -l lines -x -d 'how many lines'
complete -c llmstudioctl -n '__llmstudioctl_command explain' -l dry-run -d 'let llama-server itself tell what it would need'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l n-ctx -x -d 'context of one request'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l n-parallel -x -d 'requests at the same time (default: 4)'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l kv-unified -d 'all requests share one context'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l n-gpu-layers -x -d 'layers on one GPU'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l cache-type-k -x -a 'f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl' -d 'type of the keys (default: f16)'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l cache-type-v -x -a 'f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl' -d 'type of the values (default: f16)'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l n-ubatch -x -d 'micro-batch (default: 512)'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l no-flash-attn -d 'without flash attention'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l n-cpu-moe -x -d 'experts of N layers stay in RAM'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l draft-model -r -F -d 'a draft model beside it'
complete -c llmstudioctl -n '__llmstudioctl_command estimate' -l mmproj -r -F -d 'an encoder for pictures or sound beside it'
complete -c llmstudioctl -n '__llmstudioctl_below key' -a add -d 'make a key and print it, once'
complete -c llmstudioctl -n '__llmstudioctl_below key' -a list -d 'list the keys, without their secrets'
complete -c llmstudioctl -n '__llmstudioctl_below key' -a revoke -d 'take a key away'
complete -c llmstudioctl -n '__llmstudioctl_below key add' -l admin -d 'it may administer over TCP, and sign in at the page'
complete -c llmstudioctl -n '__llmstudioctl_below key add' -l metrics -d 'it may read the metrics over TCP'
complete -c llmstudioctl -n '__llmstudioctl_below key add' -l models -x -a '(__llmstudioctl_names id list)' -d 'it may use these models alone'
complete -c llmstudioctl -n '__llmstudioctl_below key add' -l expires -x -d 'how long it is valid, such as 30d'
complete -c llmstudioctl -n '__llmstudioctl_below key revoke' -a '(__llmstudioctl_names name key list)' -d key
complete -c llmstudioctl -n '__llmstudioctl_below recipe' -a new -d 'make a recipe for a GGUF'
complete -c llmstudioctl -n '__llmstudioctl_below recipe' -a edit -d 'open a recipe in an editor'
complete -c llmstudioctl -n '__llmstudioctl_below recipe' -a show -d "print a recipe's file"
complete -c llmstudioctl -n '__llmstudioctl_below recipe' -a delete -d "remove a recipe; the model's file stays"
complete -c llmstudioctl -n '__llmstudioctl_below recipe' -a from-command -d 'make a recipe of a llama-server command'
complete -c llmstudioctl -n '__llmstudioctl_below recipe new' -F
complete -c llmstudioctl -n '__llmstudioctl_below recipe new' -l id -x -d 'its id'
complete -c llmstudioctl -n '__llmstudioctl_below recipe new' -l set -x -d 'a field of the recipe'
complete -c llmstudioctl -n '__llmstudioctl_below recipe new' -l edit -d 'open it in an editor first'
complete -c llmstudioctl -n '__llmstudioctl_below recipe new' -l force -d 'store it even if the file is not there or damaged'
complete -c llmstudioctl -n '__llmstudioctl_below recipe edit show delete' -a '(__llmstudioctl_names id list)' -d model
complete -c llmstudioctl -n '__llmstudioctl_below recipe from-command' -l save -d 'store it'
complete -c llmstudioctl -n '__llmstudioctl_below recipe from-command' -l id -x -d 'its id'
complete -c llmstudioctl -n '__llmstudioctl_command web' -l no-open -d 'do not open it on the desktop'
complete -c llmstudioctl -n '__llmstudioctl_command web' -l sign-out -d 'end every session of the page instead'
complete -c llmstudioctl -n '__llmstudioctl_command top' -l once -d 'print it once'
