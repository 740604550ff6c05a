"""What every command shares: errors, parser, rules, names of models, process set-up, text."""
