"""The command line of mamldata: each verb's module parses, calls one public function and prints."""
