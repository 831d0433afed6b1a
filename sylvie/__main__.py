from sylvie.cli import main

main()
