from notecase_server.cli import main

main()
