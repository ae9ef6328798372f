complete --keep-order --exclusive --command form --arguments "(COMPLETE=fish form -- (commandline --current-process --tokenize --cut-at-cursor) (commandline --current-token))"
