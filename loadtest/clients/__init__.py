"""What other people's clients are made to do. Each file runs with the interpreter that has the client, and
without this project: arguments are the server's URL and its model; each check that holds is printed."""
