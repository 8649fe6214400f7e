"""What the user sees and chooses: progress, log lines, tables, options, devices. Imports only `files` of ours."""
