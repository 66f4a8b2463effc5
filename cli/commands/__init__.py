"""The verbs, a module each: parse, call one public function, print."""
