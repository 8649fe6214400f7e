"""What the user sees and presses: progress, stop signals, log lines, tables. Imports nobody of ours."""
