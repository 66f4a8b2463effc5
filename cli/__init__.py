"""The command line: each verb's module parses, calls one public function and prints."""
