"""What the user sees and presses: progress, stop signals, log lines, tables. Imports only `files` of ours."""
