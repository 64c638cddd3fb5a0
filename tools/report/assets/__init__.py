"""What a report page is made of: its template, style and scripts."""
