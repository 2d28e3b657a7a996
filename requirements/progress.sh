# Reads what `pip install -v` says, and says: every sixth file that ninja compiled, and errors.
# The last line is "ended with" and the status of pip, which becomes that of this script.
while IFS= read -r line; do
    case $line in
        *'['[0-9]*/[0-9]*'] '*)
            step=${line#*[}
            step=${step%%]*}
            case $step in
                *[!0-9/]* | */*/*) continue ;;
            esac
            if [ $((${step%/*} % 6)) -eq 0 ] || [ "${step%/*}" = "${step#*/}" ]; then
                echo "  compiled ${step%/*} of ${step#*/} files"
            fi
            ;;
        *ERROR* | *error:*) echo "$line" ;;
        'ended with '*) exit "${line##* }" ;;
    esac
done
exit 1
