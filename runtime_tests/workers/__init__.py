"""Programs outside this process that run a file: installed into a folder, started, asked, and stopped."""
