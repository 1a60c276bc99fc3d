"""Tables and one offline HTML report of runs and results."""
