#compdef %(prog_name)s

%(complete_func)s() {
    local -a words_ open_ described open_described response
    (( ! $+commands[%(prog_name)s] )) && return 1
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
        %(complete_var)s=zsh_complete %(prog_name)s 2>/dev/null)}")
    for type key descr in ${response}; do
        case "$type$descr" in
            dir*) _path_files -/ ;;
            file*) _path_files -f ;;
            plain_) words_+=("$key") ;;
            open_) open_+=("$key") ;;
            plain*) described+=("$key:$descr") ;;
            open*) open_described+=("$key:$descr") ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#open_described )) && _describe -V unsorted open_described -U -S ''
    (( $#words_ )) && compadd -U -V unsorted -a words_
    (( $#open_ )) && compadd -U -V unsorted -S '' -a open_
    return 0
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
    compdef %(complete_func)s %(prog_name)s
fi
